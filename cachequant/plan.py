"""A plan: everything that accelerates one model with one sampler, in one folder, without pickle."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cachequant.config import RunConfig, config_from_dict, config_to_dict
from cachequant.errors import UserError
from cachequant.storage import (
    content_hash,
    file_hash,
    load_json,
    load_tensors,
    make_folder,
    pack_correction,
    pack_quant,
    save_json,
    save_tensors,
    stored_quant,
    unpack_correction,
    unpack_quant,
)
from cachequant.types import Correction, QuantState, Remainder, Schedule

SCHEMA = 3
RECORD = {
    "schema": "version of this format; others are refused",
    "config": "the resolved configuration that made the plan (configuration.md)",
    "identity": "what the plan fits to",
    "timesteps": "training timestep of every evaluation, in sampling order",
    "schedule": "which evaluations run the whole network",
    "quantised": "whether quant.safetensors holds layers",
    "recipe": "for loading from the plan: classes and configurations of denoiser, scheduler and pipeline, or null",
    "provenance": "versions, seed, keys of the stages' outputs, what was measured, layers that read the cached feature",
    "files": "sha256 of every tensor file",
    "checksum": "sha256 of all other keys as canonical JSON (sorted keys, no spaces)",
}
"""Keys of plan.json and their meaning."""
TENSOR_FILES = ("correction.safetensors", "quant.safetensors", "remainder.safetensors")


@dataclass(frozen=True)
class ModelIdentity:
    """What a plan fits to; compared field by field when it is enabled.

    Attributes:
        model: class of the denoiser and its configuration as one hash.
        weights: sha256 over the names, shapes and values of its parameters.
        scheduler: class of the scheduler and the settings that move timesteps or noise levels, as one hash.
        guidance: "none" or "cfg".
    """

    model: str
    weights: str
    scheduler: str
    guidance: str

    def __post_init__(self) -> None:
        if not all(isinstance(value, str) for value in asdict(self).values()):
            raise ValueError(f"identity holds {asdict(self)}, expected text")

    def refuse_other(self, found: ModelIdentity) -> None:
        """Refuse a pipeline that this is not the identity of.

        Raises:
            UserError: names the first field that differs.
        """
        for name, want in asdict(self).items():
            got = getattr(found, name)
            if got != want:
                raise UserError(
                    f"this pipeline's {name} is {got[:32]}, the plan was made for {want[:32]}: "
                    "load that model and scheduler, or calibrate for this one"
                )


@dataclass(frozen=True)
class Plan:
    """Schedule, corrections and quantisation of one model under one sampler.

    Attributes:
        config: the resolved configuration that made it.
        identity: the model and sampler it belongs to.
        timesteps: training timestep of every evaluation, in sampling order (length T).
        schedule: which evaluations run the whole network.
        correction: maps of the cached feature and of the layers' products.
        quant: integer weights and activation tables, or None for caching alone.
        provenance: versions, seed, hashes of the parents, measured costs.
        remainder: what the denoiser is beside its integers, or None where the plan does not hold it.
    """

    config: RunConfig
    identity: ModelIdentity
    timesteps: tuple[int, ...]
    schedule: Schedule
    correction: Correction = field(default_factory=Correction)
    quant: QuantState | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    remainder: Remainder | None = None

    def save(self, folder: str | Path) -> Path:
        """Write the folder: tensors first, `plan.json` with their hashes last, each renamed into place.

        Raises:
            UserError: the folder cannot be written.
        """
        folder = make_folder(Path(folder))
        save_tensors(folder / "correction.safetensors", pack_correction(self.correction))
        save_tensors(folder / "quant.safetensors", pack_quant(self.quant) if self.quant else {})
        save_tensors(folder / "remainder.safetensors", self.remainder.tensors if self.remainder else {})
        record = self._record()
        record["files"] = {name: file_hash(folder / name) for name in TENSOR_FILES}
        record = json.loads(json.dumps(record, allow_nan=False))  # the keys as they will be read
        save_json(folder / "plan.json", {**record, "checksum": content_hash(record)})
        return folder

    def _record(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "config": config_to_dict(self.config),
            "identity": asdict(self.identity),
            "timesteps": list(self.timesteps),
            "schedule": {**asdict(self.schedule), "refresh_steps": list(self.schedule.refresh_steps)},
            "quantised": self.quant is not None,
            "recipe": self.remainder.recipe if self.remainder else None,
            "provenance": self.provenance,
        }

    @staticmethod
    def load(folder: str | Path, lazy: bool = False) -> Plan:
        """Read and verify a plan folder.

        Args:
            folder: where `save` wrote it.
            lazy: leave the integer weights in their file until each is asked for.

        Raises:
            UserError: missing, cut short, edited, or of an unknown schema; the message names the file.
        """
        folder = Path(folder)
        if not (folder / "plan.json").is_file():
            raise UserError(
                f"no plan in {folder}: expected a folder with plan.json, made by `cachequant run` or Plan.save"
            )
        record = load_json(folder / "plan.json")
        _verify(record, folder)
        try:
            schedule = {**record["schedule"], "refresh_steps": tuple(record["schedule"]["refresh_steps"])}
            path = folder / "quant.safetensors"
            quant = None
            if record["quantised"]:
                quant = stored_quant(path) if lazy else unpack_quant(load_tensors(path))
            remainder = None
            if record["recipe"] is not None:
                remainder = Remainder(load_tensors(folder / "remainder.safetensors"), record["recipe"])
            plan = Plan(
                config_from_dict(record["config"]),
                ModelIdentity(**record["identity"]),
                tuple(record["timesteps"]),
                Schedule(**schedule),
                unpack_correction(load_tensors(folder / "correction.safetensors")),
                quant,
                record["provenance"],
                remainder,
            )
            if not all(isinstance(t, int) for t in plan.timesteps) or len(plan.timesteps) != plan.schedule.num_steps:
                raise ValueError(f"{len(plan.timesteps)} timesteps for {plan.schedule.num_steps} evaluations")
            plan.summary()  # which reads what is free in form
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            reason = " ".join(str(error).split())[:80]
            raise UserError(f"{folder / 'plan.json'} is damaged ({reason}): make the plan again") from None
        return plan

    def summary(self) -> str:
        """A few lines for people: model, schedule, corrections, bits."""
        s, quant = self.schedule, self.config.quant
        layers = len(self.quant.layers) if self.quant else 0
        bits = f"W{quant.weight_bits}A{quant.activation_bits} on {layers} layers" if layers else "none"
        if len(mixed := self.provenance.get("weight_bits", {})) > 1:
            bits += f" ({', '.join(f'{count} {name}' for name, count in mixed.items())})"
        forecast = " with forecast" if self.correction.uses_forecast else ""
        lines = [
            f"model        {self.identity.model} {self.identity.weights[:12]}, guidance {self.identity.guidance}",
            f"sampler      {s.num_steps} evaluations, scheduler {self.identity.scheduler[:24]}",
            f"schedule     interval {s.interval}: {len(s.refresh_steps)} full steps {_shorten(s.refresh_steps)}",
            f"corrections  {len(self.correction.cache)} cached steps{forecast}, {len(self.correction.layers)} layers",
            f"quantised    {bits}",
        ]
        if s.cost is not None and s.uniform_cost is not None:
            lines.insert(3, f"objective    {s.cost:.6g} (uniform schedule {s.uniform_cost:.6g})")
        lines += [self._consumer_line(consumer) for consumer in self.provenance.get("consumers", [])]
        measured = self.provenance.get("measured", {})
        if {"dps_seconds", "trajectories_seconds", "ring_bytes"} <= set(measured):
            dps, whole = measured["dps_seconds"], measured["trajectories_seconds"]
            ring = measured["ring_bytes"] / 1e6
            lines.append(
                f"DPS took     {dps:.2f} s beside {whole:.2f} s of trajectories ({dps / whole:.1%}), {ring:.1f} MB"
            )
        return "\n".join(lines)

    def _consumer_line(self, consumer: dict[str, Any]) -> str:
        """What one reader of the cached feature takes from it, and whether its product is corrected."""
        line = f"reads it     {consumer['name']}: {consumer['width']} of {consumer['channels']} input channels"
        if consumer["straddling_groups"]:
            line += ", one normalisation group holds both halves"
        if consumer["name"] not in self.correction.layers:
            return f"{line}; not corrected"
        return f"{line}; corrected" + (" on the joint input" if consumer["straddling_groups"] else "")


def _verify(record: Any, folder: Path) -> None:
    """Schema, checksum of plan.json, and hashes of the tensor files."""
    path = folder / "plan.json"
    if not isinstance(record, dict) or "schema" not in record:
        raise UserError(f"{path} is not a plan: make the plan again")
    if record["schema"] != SCHEMA:
        raise UserError(f"{path} has schema {record['schema']!r}, expected {SCHEMA}: use the version that wrote it")
    body = {key: value for key, value in record.items() if key != "checksum"}
    if record.get("checksum") != content_hash(body):
        raise UserError(f"{path} was edited or cut short (its checksum does not fit): make the plan again")
    hashes = record.get("files")
    for name in TENSOR_FILES:
        expected = hashes.get(name) if isinstance(hashes, dict) else None
        if not (folder / name).is_file() or file_hash(folder / name) != expected:
            raise UserError(f"{folder / name} is missing or was changed after the plan was saved: make the plan again")


def _shorten(steps: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, steps[:12]))
    return f"[{shown}, …]" if len(steps) > 12 else f"[{shown}]"
