"""Building the compiled kernels: messages where it cannot be done, and one kernel of each kind where it can."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch

from cachequant.errors import UserError
from cachequant.kernels.cuda import build, library
from cachequant.kernels.cuda.variants import VARIANTS, Variant, variants_for


def test_names_are_unique_and_every_source_is_there():
    assert len({v.name for v in VARIANTS}) == len(VARIANTS)
    assert all((build.SOURCES / v.source).is_file() for v in VARIANTS)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_every_card_has_a_product_and_a_convolution_in_both_types(capability):
    kinds = {(v.operation, v.dtype) for v in variants_for(capability)}
    wanted = {(o, d) for o in ("linear", "conv2d") for d in (torch.float16, torch.bfloat16)}
    assert wanted <= kinds
    assert {v.arch for v in variants_for(capability)} == ({90} if capability == (9, 0) else {80})


def test_what_is_documented_as_tritons_has_no_compiled_kernel():
    """The table in the docstring of `cachequant.kernels.cuda`."""
    both = {torch.float16, torch.bfloat16}
    for arch in (80, 90):
        ends = {
            kind: {v.dtype for v in VARIANTS if (v.operation, v.arch) == (kind, arch)} for kind in ("linear", "conv2d")
        }
        assert ends == {"linear": both | {torch.int8}, "conv2d": both}
    assert {(v.operation, v.arch, v.activation) for v in VARIANTS if v.activation} == {("linear", 90, "gelu_tanh")}
    asymmetric = {(v.operation, v.arch) for v in VARIANTS if v.unsupported(32, 32, has_row_sum=True)}
    assert asymmetric == {("conv2d", 80)}


def test_old_cards_have_none():
    assert variants_for((7, 5)) == ()


def test_alignment_is_named():
    gemm, conv80 = VARIANTS[0], next(v for v in VARIANTS if v.operation == "conv2d" and v.arch == 80)
    assert gemm.unsupported(320, 320, has_row_sum=True) is None
    assert "12 input channels" in str(gemm.unsupported(12, 320, has_row_sum=False))
    assert "4 output channels" in str(gemm.unsupported(320, 4, has_row_sum=False))
    assert conv80.unsupported(320, 320, has_row_sum=True) == "asymmetric weights"


def test_without_a_compiler_the_message_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(build.FOLDER, str(tmp_path))
    monkeypatch.setattr(build, "compiler", lambda: None)
    with pytest.raises(UserError, match="nvcc was not found"):
        build.build(VARIANTS[:1])
    assert build.main(["--arch", "90"]) == 2
    assert "nvcc was not found" in capsys.readouterr().err


def test_without_headers_the_message_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv(build.FOLDER, str(tmp_path))
    monkeypatch.setenv(build.HEADERS, str(tmp_path))
    monkeypatch.setattr(build, "compiler", lambda: "nvcc")
    with pytest.raises(UserError, match=r"nvidia-cutlass==4\.2\.0\.0"):
        build.build(VARIANTS[:1])


def test_a_failing_compiler_leaves_nothing_behind(monkeypatch, tmp_path):
    include = tmp_path / "include" / "cutlass"
    include.mkdir(parents=True)
    (include / "cutlass.h").touch()
    fake = tmp_path / "nvcc"
    fake.write_text("#!/bin/sh\necho 'x.cu(1): error: nonsense' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv(build.FOLDER, str(tmp_path / "made"))
    monkeypatch.setenv(build.HEADERS, str(tmp_path))
    monkeypatch.setattr(build, "compiler", lambda: str(fake))
    with pytest.raises(UserError, match="error: nonsense"):
        build.build(VARIANTS[:1])
    assert list((tmp_path / "made").iterdir()) == []


def one_of_each_kind() -> list[Variant]:
    kinds: dict[tuple[str, int, str | None], Variant] = {}
    for variant in VARIANTS:
        kinds.setdefault((variant.operation, variant.arch, variant.activation), variant)
    return list(kinds.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("variant", one_of_each_kind(), ids=lambda v: v.name)
def test_one_kernel_of_each_kind_compiles(variant):
    """Into the cache folder, so that a second run only loads it."""
    if (reason := build.unavailable()) is not None:
        missed = pytest.fail if os.environ.get("CACHEQUANT_TEST_KERNELS") else pytest.skip  # make test-kernels
        missed(f"kernels are not compiled here: {reason}")
    path = build.compile_variant(variant)
    assert path == build.library_path(variant)
    loaded = ctypes.CDLL(str(path))
    assert all(hasattr(loaded, name) for name in ("cq_run", "cq_workspace", "cq_shared_memory"))
    assert 0 < library.shared_memory(variant) <= (227 if variant.arch == 90 else 99) * 1024
