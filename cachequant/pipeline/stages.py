"""The six stages of one configuration, each computed once and filed by content."""

from __future__ import annotations

from collections import Counter
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from cachequant import __version__
from cachequant.budget import Allowance
from cachequant.correction import Moments
from cachequant.costs import COSTS
from cachequant.models.skeleton import remainder_of
from cachequant.pipeline.at_work import backend_of
from cachequant.pipeline.calibrate import Calibration, StepInput, choose_schedule, gather
from cachequant.pipeline.context import Context
from cachequant.pipeline.dec_cache import solve_maps
from cachequant.pipeline.dec_quant import fit_output
from cachequant.pipeline.features import gather_moments
from cachequant.pipeline.pace import within_budget
from cachequant.pipeline.quant_params import calibrate_quantisers, quantise_weights
from cachequant.pipeline.reconstruct import reconstruct
from cachequant.pipeline.round_weights import needing, round_weights
from cachequant.pipeline.store import StageStore
from cachequant.pipeline.walk import Walk
from cachequant.plan import Plan
from cachequant.shards import ShardSet
from cachequant.storage import (
    load_json,
    load_tensors,
    pack_correction,
    pack_quant,
    pack_tables,
    save_json,
    save_tensors,
    unpack_correction,
    unpack_quant,
)
from cachequant.types import Correction, QuantState, Schedule

STAGES = ("calibrate", "dump_features", "fit_dec_cache", "quant_params", "fit_dec_quant", "sample")
LATER = ("rounding", "rounding_samples", "budget", "recon")
"""Settings of the quantisation that its first grids do not depend on."""


@dataclass(frozen=True)
class Stages:
    """Asks for each stage's output; what it needs is asked for first.

    Attributes:
        context: pipeline and configuration, a time budget already turned into a number of refreshes.
        store: where outputs are.
        allowance: the time budget that this number comes from, if it does.
        chosen: a schedule to take instead of the configuration's.
    """

    context: Context
    store: StageStore
    allowance: Allowance | None = None
    chosen: Schedule | None = None

    @staticmethod
    def at(context: Context, folder: Path | None = None, only: int | None = None, quiet: bool = False) -> Stages:
        """The stages of a run folder, default `output/model.name`; `only` allows one stage to be computed."""
        config = context.config
        root = folder or Path(config.output) / (config.model.name or "run")
        allowed = frozenset({only}) if only else frozenset(range(1, 7))
        store = StageStore(root, allowed, quiet)
        context, allowance = within_budget(context, store)
        return Stages(context, store, allowance)

    def run(self, number: int) -> Any:
        """Output of stage `number`, 1 to 6."""
        stages = (self.schedule, self.moments, self.cache_correction, self.quant, self.correction, self.samples)
        return stages[number - 1]()

    def calibration(self) -> tuple[Calibration, str]:
        """Stage 1, first half: trajectories, distances, calibration inputs."""
        inputs, context = self._calibration_inputs(), self.context
        return self.store.obtain(1, "calibrate", inputs, lambda: gather(context), _save_calibration, _load_calibration)

    def calibration_key(self) -> str:
        """Key of `calibration`, which need not be there."""
        return self.store.key(1, "calibrate", self._calibration_inputs())

    def _calibration_inputs(self) -> dict[str, Any]:
        config, context = self.context.config, self.context
        inputs: dict[str, Any] = {
            "identity": asdict(context.identity),
            "timesteps": list(context.timesteps),
            "sampler": asdict(config.sampler),
            "prompts": list(context.generator().prompts),
            "cache": asdict(config.cache),
            "cost": config.schedule.cost,
            "calibration": asdict(config.calibration),
        }
        if COSTS[config.schedule.cost].rounded:
            inputs["activation_bits"] = config.quant.activation_bits
        return inputs

    def schedule(self) -> tuple[Schedule, str]:
        """Stage 1, second half: the schedule."""
        calibration, parent = self.calibration()
        if self.chosen is not None:
            return self.chosen, self.store.key(1, "schedule", {"parent": parent, "chosen": asdict(self.chosen)})
        config = self.context.config
        inputs: dict[str, Any] = {"parent": parent, "schedule": asdict(config.schedule)}
        if config.schedule.fallback:
            inputs["correction"] = asdict(config.correction)
        if self.allowance is not None and not self.allowance.equal:
            inputs["allowance"] = asdict(self.allowance)

        def save(folder: Path, value: Schedule) -> None:
            save_json(folder / "schedule.json", asdict(value))

        def load(folder: Path) -> Schedule:
            record = load_json(folder / "schedule.json")
            return Schedule(**{**record, "refresh_steps": tuple(record["refresh_steps"])})

        def compute() -> Schedule:
            return choose_schedule(self.context, calibration, self.allowance)

        return self.store.obtain(1, "schedule", inputs, compute, save, load)

    def moments(self) -> tuple[dict[int, Moments], str]:
        """Stage 2: sums of true against reused features."""
        (_, parent), (schedule, _) = self.calibration(), self.schedule()
        settings = self.context.config.correction
        free = settings.trajectory == "free_running"
        inputs = {
            "parent": parent,
            "refresh_steps": list(schedule.refresh_steps),
            "forecast": settings.forecast,
            "trajectory": settings.trajectory,
            "solve": [settings.ridge, settings.inflation] if free else None,
        }

        def compute() -> dict[int, Moments]:
            return gather_moments(self.context, schedule) if settings.cache else {}

        name = "dump_features" if settings.cache else "no_features"
        return self.store.obtain(2, name, inputs, compute, _save_moments, _load_moments)

    def cache_correction(self) -> tuple[Correction, str]:
        """Stage 3: a₁, b₁ and the forecast's factor."""
        moments, parent = self.moments()
        settings = self.context.config.correction

        def compute() -> Correction:
            return Correction(solve_maps(moments, settings.ridge, settings.inflation))

        inputs = {"parent": parent, "ridge": settings.ridge, "inflation": settings.inflation}
        return self.store.obtain(3, "fit_dec_cache", inputs, compute, _save_correction, _load_correction)

    def weights(self) -> tuple[QuantState, str]:
        """Stage 4, first half: integer weights, shared by every schedule and correction."""
        identity = self.context.identity
        inputs = {"weights": [identity.model, identity.weights], "quant": self._grid_settings()}

        def save(folder: Path, value: QuantState) -> None:
            save_tensors(folder / "weights.safetensors", pack_quant(value))

        def load(folder: Path) -> QuantState:
            return unpack_quant(load_tensors(folder / "weights.safetensors"))

        return self.store.obtain(4, "quant_weights", inputs, lambda: quantise_weights(self.context), save, load)

    def grids(self) -> tuple[QuantState, str]:
        """Stage 4, second half: activation tables, and the weights as they are so far."""
        (calibration, _), (schedule, _) = self.calibration(), self.schedule()
        correction, parent = self.cache_correction()
        weights, _ = self.weights()

        def compute() -> QuantState:
            return calibrate_quantisers(self.context, calibration, schedule, correction, weights)

        def save(folder: Path, value: QuantState) -> None:
            save_tensors(folder / "tables.safetensors", pack_tables(value))

        def load(folder: Path) -> QuantState:
            return unpack_quant({**pack_quant(weights), **load_tensors(folder / "tables.safetensors")})

        inputs = {"parent": parent, "quant": self._grid_settings()}
        return self.store.obtain(4, "quant_params", inputs, compute, save, load)

    def quant(self) -> tuple[QuantState | None, str]:
        """Stage 4: integer weights and activation tables; None where quantisation is off."""
        settings = self.context.config.quant
        if not settings.enabled:
            return None, self.cache_correction()[1]
        state, key = self.grids()
        if settings.rounding == "compensated" and needing(state):
            state, key = self._rounded(state, key)
        if settings.recon.enabled:
            state, key = self._reconstructed(state, key)
        return state, key

    def _rounded(self, state: QuantState, parent: str) -> tuple[QuantState, str]:
        """Stage 4, where weights are rounded in closed form."""
        inputs = {"parent": parent, "quant": asdict(self.context.config.quant) | {"recon": None}}
        return self.store.obtain(
            4, "round_weights", inputs, lambda: round_weights(self._walk(), state), _save_quant, _load_quant
        )

    def _reconstructed(self, state: QuantState, parent: str) -> tuple[QuantState, str]:
        """Stage 4, where blocks are trained: its folder holds those that are done."""
        inputs = {"parent": parent, "recon": asdict(self.context.config.quant.recon)}
        folder = self.store.folder(4, "reconstruct", self.store.key(4, "reconstruct", inputs))

        def compute() -> QuantState:
            return reconstruct(self._walk(), state, folder)

        return self.store.obtain(4, "reconstruct", inputs, compute, _save_quant, _load_quant, resumes=True)

    def _walk(self) -> Walk:
        """What stage 4 looks at."""
        (calibration, _), (schedule, _), (correction, _) = self.calibration(), self.schedule(), self.cache_correction()
        return Walk(self.context, calibration, schedule, correction)

    def _grid_settings(self) -> dict[str, Any]:
        """What determines nearest weights and activation tables."""
        settings = asdict(self.context.config.quant)
        return {key: value for key, value in settings.items() if key not in LATER}

    def correction(self) -> tuple[Correction, str]:
        """Stage 5: the corrections of the quantised layers beside those of the cache."""
        (correction, _), key = self._fitted()
        return correction, key

    def _fitted(self) -> tuple[tuple[Correction, dict[str, float]], str]:
        """Stage 5, with the errors by which the map of the prediction was chosen."""
        (schedule, _), (correction, _), (state, parent) = self.schedule(), self.cache_correction(), self.quant()
        calibration, _ = self.calibration()

        def compute() -> tuple[Correction, dict[str, float]]:
            return fit_output(self.context, schedule, correction, state, calibration.spread)

        def save(folder: Path, value: tuple[Correction, dict[str, float]]) -> None:
            _save_correction(folder, value[0])
            if value[1]:
                save_json(folder / "chosen.json", value[1])

        def load(folder: Path) -> tuple[Correction, dict[str, float]]:
            chosen = folder / "chosen.json"
            return _load_correction(folder), load_json(chosen) if chosen.is_file() else {}

        inputs = {"parent": parent, "correction": asdict(self.context.config.correction)}
        return self.store.obtain(5, "fit_dec_quant", inputs, compute, save, load)

    def plan(self) -> tuple[Plan, str]:
        """Everything that stages 1 to 5 found, as one plan, and the key of its content."""
        (schedule, _), (state, quant_key), ((correction, errors), key) = self.schedule(), self.quant(), self._fitted()
        calibration, first = self.calibration()
        context, config = self.context, self.context.config
        provenance = {
            "cachequant": __version__,
            "torch": torch.__version__.split("+")[0],
            "seed": config.calibration.seed,
            "parents": {"calibrate": first, "quant_params": quant_key, "fit_dec_quant": key},
            "measured": calibration.measured,
            "weight_bits": _weight_bits(state),
            "consumers": [asdict(consumer) for consumer in context.adapter.consumers()],
        }
        if errors:
            provenance["output"] = errors
        if self.allowance is not None:
            spent = self.allowance.spent(schedule.refresh_steps)
            provenance["budget"] = {"network_ms": self.allowance.budget, "expected_ms": spent}
        identity, timesteps = context.identity, context.timesteps
        remainder = None if state is None else remainder_of(context.pipe, state)
        return Plan(config, identity, timesteps, schedule, correction, state, provenance, remainder), key

    def save_plan(self) -> Path:
        """Write the plan into the run folder, named by method, interval and bits: its folder."""
        plan, key = self.plan()
        quant, interval = plan.config.quant, plan.schedule.interval
        bits = f"w{quant.weight_bits}a{quant.activation_bits}" if plan.quant else "float"
        method = Path(plan.config.method).stem
        return plan.save(self.store.root / f"plan-{method}-n{interval}-{bits}-{key[:8]}")

    def samples(self) -> tuple[ShardSet, str]:
        """Stage 6: images of the plan; what several workers have left to do (`fill`), this process does."""
        from cachequant.pipeline.workers import make_trainer  # Lightning is imported by those who sample

        inputs = self._sample_inputs(self.plan()[1])

        def compute() -> ShardSet:
            folder, _ = self._images_folder()
            if not (folder / "set.json").is_file() or ShardSet.open(folder).pending():
                self.fill(make_trainer(str(self.context.pipe.device)))
            return ShardSet.open(folder)

        return self.store.obtain(6, "sample", inputs, compute, lambda *_: None, ShardSet.open, resumes=True)

    def fill(self, trainer: Any) -> None:
        """The work of stage 6, by every worker; the first one sees to the stages before it, the others wait for it."""
        from cachequant.api import disable, enable, find  # which knows the stages
        from cachequant.pipeline.sampling import Draw, ShardSampler, begin_set, fill

        context = self.context
        bars = dict(getattr(context.pipe, "_progress_bar_config", {}))

        def begin() -> None:
            folder, key = self._images_folder()
            begin_set(folder, {"key": key}, context.config)

        def join() -> tuple[ShardSet, Draw]:
            with redirect_stdout(StringIO()):
                enable(context.pipe, self.plan()[0], context.config.backend)
            context.pipe.set_progress_bar_config(disable=True)
            return ShardSet.open(self._images_folder()[0]), context.generator(sampling=True)

        try:
            fill(trainer, ShardSampler(begin, join, context.config.sample.batch_size))
        finally:
            context.pipe.set_progress_bar_config(**bars)
            if find(context.pipe) is not None:
                disable(context.pipe)

    def _images_folder(self) -> tuple[Path, str]:
        """Where stage 6's images go, and their key."""
        _, parent = self.plan()
        key = self.store.key(6, "sample", self._sample_inputs(parent))
        return self.store.folder(6, "sample", key), key

    def _sample_inputs(self, parent: str) -> dict[str, Any]:
        """What determines stage 6's images."""
        prompts = self.context.generator(sampling=True).prompts
        return {
            "parent": parent, "sample": asdict(self.context.config.sample), "prompts": list(prompts), "files": "shards",
            "backend": backend_of(self.context).name,
        }  # fmt: skip


def _weight_bits(state: QuantState | None) -> dict[str, int]:
    """How many layers have weights of how many bits."""
    layers = state.layers.values() if state else ()
    return dict(sorted(Counter(f"w{layer.weights[0].bits}" for layer in layers).items()))


def _save_quant(folder: Path, value: QuantState) -> None:
    save_tensors(folder / "quant.safetensors", pack_quant(value))


def _load_quant(folder: Path) -> QuantState:
    return unpack_quant(load_tensors(folder / "quant.safetensors"))


def _save_correction(folder: Path, value: Correction) -> None:
    save_tensors(folder / "correction.safetensors", pack_correction(value))


def _load_correction(folder: Path) -> Correction:
    return unpack_correction(load_tensors(folder / "correction.safetensors"))


def _save_calibration(folder: Path, value: Calibration) -> None:
    flat = {"band": value.band, "weights": value.weights, "spread": value.spread}
    for step, entry in enumerate(value.inputs):
        flat[f"inputs.{step}.x"] = entry.x
        flat[f"inputs.{step}.timestep"] = entry.timestep
        flat |= {
            f"inputs.{step}.kwargs.{name}": tensor
            for name, tensor in entry.kwargs.items()
            if step == 0 or not torch.equal(tensor, value.inputs[0].kwargs[name])
        }
    save_tensors(folder / "calibration.safetensors", flat)
    save_json(folder / "measured.json", {"cost": value.cost, "measured": value.measured})


def _load_calibration(folder: Path) -> Calibration:
    flat, record = load_tensors(folder / "calibration.safetensors"), load_json(folder / "measured.json")
    entries: list[StepInput] = []
    for step in range(len(flat["band"])):
        prefix = f"inputs.{step}.kwargs."
        own = {name[len(prefix) :]: tensor for name, tensor in flat.items() if name.startswith(prefix)}
        kwargs = own if step == 0 else {**entries[0].kwargs, **own}  # the same conditioning is saved once
        entries.append(StepInput(flat[f"inputs.{step}.x"], flat[f"inputs.{step}.timestep"], kwargs))
    band, weights, spread = flat["band"], flat["weights"], flat["spread"]
    return Calibration(band, record["cost"], weights, spread, tuple(entries), record["measured"])


def _save_moments(folder: Path, value: dict[int, Moments]) -> None:
    grams = {str(step): moments.gram for step, moments in value.items() if moments.gram is not None}
    save_tensors(folder / "moments.safetensors", grams)


def _load_moments(folder: Path) -> dict[int, Moments]:
    grams = load_tensors(folder / "moments.safetensors")
    return {int(step): Moments(gram) for step, gram in sorted(grams.items(), key=lambda item: int(item[0]))}
