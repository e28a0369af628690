"""The choice of the GPU backend: why it does not run, and what multiplies where it does."""

from __future__ import annotations

import pytest
import torch

from cachequant.errors import UserError
from cachequant.kernels.backend import CUDA_INT8, SIMULATED, choose_backend
from cachequant.kernels.cuda import build, dispatch
from cachequant.kernels.cuda.variants import variants_for

CARD = torch.device("cuda")


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A stand-in for a Hopper card without a compiled kernel; returns a function that changes its compute capability."""
    monkeypatch.setenv(build.FOLDER, str(tmp_path))
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dispatch.built.cache_clear()

    def be(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    be(9, 0)
    yield be
    dispatch.built.cache_clear()


def test_a_model_on_the_cpu_is_refused():
    with pytest.raises(UserError, match="the model is on cpu"):
        choose_backend(CUDA_INT8, torch.device("cpu"))


def test_without_compiled_kernels_triton_multiplies_and_the_note_says_what_to_do(card, monkeypatch):
    monkeypatch.setattr(build, "unavailable", lambda: None)
    chosen = choose_backend("auto", CARD)
    assert chosen.name == CUDA_INT8
    assert (
        f"0 of {len(variants_for((9, 0)))} CUTLASS kernels" in chosen.note
        and "cachequant.kernels.cuda.build" in chosen.note
    )


def test_the_note_names_what_a_build_lacks(card, monkeypatch):
    monkeypatch.setattr(build, "unavailable", lambda: "nvcc was not found")
    assert choose_backend(CUDA_INT8, CARD).note.endswith("nvcc was not found")


def test_with_all_kernels_built_nothing_is_missing(card):
    for variant in variants_for((9, 0)):
        build.library_path(variant).touch()
    assert choose_backend("auto", CARD).note == f"integers on the GPU, {len(variants_for((9, 0)))} CUTLASS kernels"


def test_an_old_card_simulates_and_says_why(card):
    card(7, 5)
    chosen = choose_backend("auto", CARD)
    assert chosen.name == SIMULATED and "compute capability 7.5" in chosen.note
    with pytest.raises(UserError, match=r"7\.5, INT8 needs 8\.0"):
        choose_backend(CUDA_INT8, CARD)


def test_without_triton_it_does_not_run(card, monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert "Triton is not installed" in choose_backend("auto", CARD).note


def test_candidates_of_an_unaligned_layer_are_tritons(card):
    pytest.importorskip("triton", reason="Triton is not installed")
    for variant in variants_for((9, 0)):
        build.library_path(variant).touch()
    names = dispatch.candidates((9, 0), "conv2d", 4, 320, torch.float16, False)
    assert names and all(name.startswith(dispatch.TRITON) for name in names)
    aligned = dispatch.candidates((9, 0), "conv2d", 320, 320, torch.float16, True)
    compiled = {v.name for v in variants_for((9, 0)) if v.operation == "conv2d" and v.dtype is torch.float16}
    assert {name for name in aligned if not name.startswith(dispatch.TRITON)} == compiled


def test_a_kernel_with_an_activation_serves_that_one_alone(card, monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    for variant in variants_for((9, 0)):
        build.library_path(variant).touch()
    activated = dispatch.activated_candidates((9, 0), "gelu_tanh", 1152, 4608, True)
    assert activated and all("gelu_tanh" in name for name in activated)
    assert dispatch.activated_candidates((9, 0), "geglu", 1152, 4608, True) == ()
    plain = dispatch.candidates((9, 0), "linear", 1152, 4608, torch.int8, True)
    assert plain and not set(plain) & set(activated)


def test_tiles_that_no_card_of_the_kind_has_room_for_are_not_offered(card):
    pytest.importorskip("triton", reason="Triton is not installed")
    wide, hopper, ada = "triton_128x256x128x8x3", (9, 0), (8, 9)  # 3 stages of (128 + 2·256)·128 bytes are 240 KiB
    assert wide not in dispatch.activated_candidates(hopper, "geglu", 320, 1280, False)
    assert wide in dispatch.activated_candidates(hopper, "gelu", 320, 1280, False)
    few = dispatch.activated_candidates(ada, "geglu", 320, 1280, False)
    assert few and set(few) < set(dispatch.activated_candidates(hopper, "geglu", 320, 1280, False))
