"""Configuration: `_base.yaml` ← method YAML ← model YAML ← its `methods: {NAME: …}` ← overrides, checked against one schema.

Every key that exists is a field below. A key that does not exist, or has the wrong type, is an error that names it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cachequant.config_values import validate
from cachequant.errors import UserError

_MISFITS = (OmegaConfBaseException, RecursionError, ValueError, TypeError, AttributeError)
"""What OmegaConf raises of values that are not of a key's type; of a list where a section belongs, a plain TypeError."""


@dataclass
class ModelConfig:
    """Which pretrained pipeline is accelerated.

    `path`: diffusers folder (relative to the repository), hub id, or an original checkpoint file. `family`: one of
    `FAMILIES`; a file needs it, a folder or hub id gets its sampler. `original_config`, `weights`: as in
    `cachequant convert`, for a file. `name`: of the run's folder in `output`.
    """

    path: str = ""
    name: str = ""
    family: str = ""
    original_config: str | None = None
    weights: str = "auto"


@dataclass
class SamplerConfig:
    """How the pipeline is called: `steps` of the sampler, `eta` of DDIM (0 is deterministic).

    `guidance_scale`: of classifier-free guidance, None for a model without it.
    `prompts`: file of `cachequant.models.prompts`. `labels`: class ids, cycled; None spreads the images over all classes.
    """

    steps: int = 100
    eta: float = 0.0
    guidance_scale: float | None = None
    prompts: str | None = None
    labels: list[int] | None = None


@dataclass
class CacheConfig:
    """What is reused and how often: `interval` is the average number of evaluations that share one feature.

    `refreshes`: full steps of a run, None is ceil(steps / interval). `budget_ms` or `speedup` choose both, and the
    interval with them, from measured step times: milliseconds of a run of `sample.batch_size` images without decoding, or
    how many times faster than the untouched model it is.

    `feature_bits`: 8 holds cached features as integers, a quarter of float32's memory; None as they are.

    `branch`: of a U-Net, decoder positions behind the cache site, 0 keeps only the last. `span`: of a transformer, first
    and last block whose sum is cached, 0-based; None is the middle half.
    """

    interval: int = 10
    branch: int = 0
    span: list[int] | None = None
    feature_bits: int | None = None
    refreshes: int | None = None
    budget_ms: float | None = None
    speedup: float | None = None


@dataclass
class ScheduleConfig:
    """`kind`: uniform, power or dps. `cost`: of `cachequant.costs`. `fallback`: measure uniform too and keep the better.

    `center`, `power`: of DeepCache's schedule (`kind: power`), dense around step `center`, the denser the larger `power`.
    """

    kind: str = "dps"
    cost: str = "l1"
    fallback: bool = False
    center: float = 0.0
    power: float = 1.4


@dataclass
class CorrectionConfig:
    """`trajectory`: full_precision (the paper) or free_running. `layers`: none, consumers or all quantised layers.

    `cache`: correct the reused feature; `forecast`: from two features, the one refreshed a group earlier beside the newest.
    `ridge`, `inflation`: of `cachequant.correction.Moments.solve`; the inflation is that of the cached feature's map.
    `held_out` (free_running only) shrinks every layer's map towards no change, by what the half of the samples that it was
    not fitted on confirms.
    `output` maps the prediction too, with x_t as second regressor (free_running only): none, least_squares towards the
    full-precision model at the same x_t, refreshes, which does so on full steps only, spread, which on cached steps also
    keeps the spread of its trajectories, or auto, the one of the last three that measures best on held-out noise.
    """

    cache: bool = True
    forecast: bool = False
    layers: str = "consumers"
    trajectory: str = "full_precision"
    ridge: float = 0.0
    inflation: float = 0.0
    output: str = "none"
    held_out: bool = False


@dataclass
class ReconConfig:
    """Reconstruction of `cachequant.quant.learned`, `--recon` (`enabled`): rounding and activation grids trained by blocks.

    `samples` rows per block over all steps, `batch_size` of them in each of `iterations`. Learning rates: `weight_lr` of the
    rounding, `scale_lr` of activation scales as a share of each, `zero_point_lr` of weight and activation zero points in
    steps of the grid. `regulariser`: pull of every rounding towards a whole one, over the error's. `drop`: share of the
    activations that a block reads unrounded while it trains.
    """

    enabled: bool = False
    iterations: int = 3000
    samples: int = 1024
    batch_size: int = 32
    weight_lr: float = 1e-2
    scale_lr: float = 1e-4
    zero_point_lr: float = 0.0
    regulariser: float = 10.0
    drop: float = 0.0


@dataclass
class QuantConfig:
    """Bits and range search. `ends_bits`, `attention_bits` None: end convolutions, attention operands stay as they are.

    `enabled`: quantise at all. `weight_bits`, `activation_bits`: of every layer between the ends; `time_embedding`: those of
    the time embedding too. `weight_search`, `activation_search`: how ranges are found, of `cachequant.quant.affine`.
    `weight_symmetric`: weight grids of 8 bits around zero, fewer bits use both ends of a range; the paper's never are,
    which costs integer kernels a sum per activation.
    `rounding` of weights below 8 bits: nearest, or compensated from second moments of `rounding_samples` trajectories
    (`cachequant.quant.rounding`), which also searches their grids. With it, `budget` is the share of the full-precision
    bytes that weights and everything left in full precision may take: what is to spare keeps layers at 8 bits.
    `bits_map`: pattern of layer names (first match counts) -> w8a8, w4a8, … or float for a layer that stays as it is.
    `weight_format`, `activation_format` of everything else: int, or fp8 and log2, which are simulated only.
    """

    enabled: bool = True
    weight_bits: int = 8
    activation_bits: int = 8
    ends_bits: int | None = 8
    attention_bits: int | None = 8
    time_embedding: bool = True
    weight_search: str = "mse"
    weight_symmetric: bool = False
    activation_search: str = "mse"
    rounding: str = "nearest"
    rounding_samples: int = 64
    budget: float | None = None
    bits_map: dict[str, str] = field(default_factory=dict)
    weight_format: str = "int"
    activation_format: str = "int"
    recon: ReconConfig = field(default_factory=ReconConfig)

    def symmetric(self, bits: int) -> bool:
        """Whether weights of so many bits get grids around zero."""
        return self.weight_symmetric and bits >= 8


@dataclass
class CalibrationConfig:
    """Sizes of the calibration: `samples` trajectories, `refresh_inputs` / `cached_inputs` of them kept per step.

    `dps_samples` of them, in whole batches, measure the distances of the schedule; stages 2 and 5 draw `dec_samples` fresh
    ones; None is as many as `samples`. The network sees `batch_size` samples at once, also in free-running fits, where all
    samples advance together; only `correction.layers=all` takes them in one batch, since every layer's fit must be in use
    before the next layer. `prompts`: the calibration's, disjoint from the sampler's; None takes those. `seed`: of the first
    trajectory.
    """

    samples: int = 16
    dps_samples: int | None = None
    dec_samples: int | None = None
    batch_size: int = 16
    refresh_inputs: int = 16
    cached_inputs: int = 16
    seed: int = 1243
    prompts: str | None = None


@dataclass
class SampleConfig:
    """Stage 6: `count` images, `batch_size` at once, the first from the noise of `seed`, each from the next."""

    count: int = 16
    batch_size: int = 16
    seed: int = 90000


@dataclass
class RunConfig:
    """The whole configuration of a run. `backend`: what computes integers when sampling: auto (the fastest of ours that is
    exact here), simulated, cpu-int8, cuda-int8, or torch_quantizer (that package's modules, on a GPU).

    `method`: name of a file in configs/method, or the path of a YAML, whose keys lie under those of the model's file.
    `output`: folder of run folders. `device`: auto, cpu, cuda or cuda:N.
    """

    method: str = "best"
    output: str = "runs"
    device: str = "auto"
    backend: str = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


def repository_folder() -> Path:
    """The folder that holds `configs/` and `assets/`: the checkout that this package is installed from."""
    return Path(__file__).resolve().parent.parent


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a model YAML, put it over its method and the base, apply overrides, and check everything.

    Args:
        path: model YAML. `method: NAME` in it (or in an override) chooses configs/method/NAME.yaml, or a YAML path. What
            lies under `methods: {NAME: …}` in it counts with that method only.
        overrides: `key=value` strings, as `--set` gives them.

    Raises:
        UserError: missing file, YAML that does not parse, unknown key, wrong type, value out of range.
    """
    path = Path(path)
    own = read_yaml(path)
    extra = _parse_overrides(overrides or [])
    base = read_yaml(repository_folder() / "configs" / "_base.yaml")
    try:
        for_methods = _methods_section(own, path.name)
        _reject_unknown(own, path.name)
        _reject_unknown(extra, "--set")
        method = next((layer["method"] for layer in (extra, own, base) if "method" in layer), "best")
        method_yaml = read_yaml(method_path(str(method)))
        _reject_unknown(method_yaml, f"method {method}")
        for_method = for_methods.get(method, DictConfig({}))
    except (OmegaConfBaseException, RecursionError) as error:
        raise _misfit(error, str(path)) from None
    layers = base, method_yaml, own, for_method, extra
    try:
        resolved = _typed(*layers)
    except _MISFITS as error:
        raise _misfit(error, str(path), layers) from None
    validate(resolved)
    return resolved


def _typed(*layers: DictConfig) -> RunConfig:
    """The configuration of layers, later ones over earlier ones; what lists hold is checked too."""
    resolved = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), *layers))
    assert isinstance(resolved, RunConfig)
    OmegaConf.structured(resolved)  # merging alone lets a list of lists pass
    return resolved


def _misfit(error: Exception, where: str, layers: tuple[DictConfig, ...] = ()) -> UserError:
    """The one line for values that do not fit; without a key in the error, the first one that does not fit even alone."""
    place = getattr(error, "full_key", None) or next(filter(None, map(_misfitting_key, layers)), "")
    return UserError(
        f"{where}: {place}{': ' if place else ''}{_first_line(error)}; expected the types in cachequant/config.py"
    )


def _misfitting_key(layer: DictConfig) -> str | None:
    """A key of a layer whose value is not of its type."""
    plain: Any = OmegaConf.to_container(layer, resolve=False)
    for section, values in plain.items():
        parts = {f"{section}.{key}": {key: value} for key, value in values.items()} if isinstance(values, dict) else {}
        for name, part in (parts or {str(section): values}).items():
            try:
                _typed(OmegaConf.create({section: part}))
            except _MISFITS:
                return name
    return None


def _methods_section(own: DictConfig, where: str) -> dict[str, DictConfig]:
    """Takes `methods` out of a model's YAML: method -> keys that count with it only."""
    section = own.pop("methods", DictConfig({}))
    if not isinstance(section, DictConfig):
        raise UserError(f"{where}: methods is {section!r}, expected sections such as best: {{cache: {{branch: 0}}}}")
    found = {str(name): keys for name, keys in section.items()}
    for name, keys in found.items():
        method_path(name)
        if not isinstance(keys, DictConfig):
            raise UserError(f"{where}: methods.{name} is {keys!r}, expected a section of keys")
        _reject_unknown(keys, f"{where}, methods.{name}")
    return found


def method_path(method: str) -> Path:
    """Path of a method YAML given by name or by path."""
    if method.endswith((".yaml", ".yml")):
        return Path(method)
    path = repository_folder() / "configs" / "method" / f"{method}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise UserError(f"method is {method!r}, expected one of {', '.join(names)} or the path of a YAML")
    return path


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested dictionary of a resolved configuration, ready for JSON."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def config_from_dict(values: dict[str, Any], changes: DictConfig | None = None) -> RunConfig:
    """The inverse of `config_to_dict`, with the same checks as `load_config`; `changes` are laid over it."""
    layers = OmegaConf.create(values), changes or OmegaConf.create({})
    try:
        resolved = _typed(*layers)
    except _MISFITS as error:
        raise _misfit(error, "configuration", layers) from None
    validate(resolved)
    return resolved


def apply_overrides(config: RunConfig, overrides: list[str]) -> RunConfig:
    """A resolved configuration with `key=value` changes.

    Raises:
        UserError: as `load_config`.
    """
    extra = _parse_overrides(overrides)
    _reject_unknown(extra, "--set")
    return config_from_dict(config_to_dict(config), extra)


def read_yaml(path: Path) -> DictConfig:
    """A YAML file of `key: value` lines.

    Raises:
        UserError: missing, or not such a file.
    """
    if not path.is_file():
        raise UserError(f"no configuration file {path}; expected a YAML such as configs/fashion.yaml")
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {_first_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} holds a list or a scalar, expected `key: value` lines")
    return loaded


def _parse_overrides(overrides: list[str]) -> DictConfig:
    for item in overrides:
        if "=" not in item:
            raise UserError(f"--set {item!r}: expected key=value, such as cache.interval=5")
    try:
        return OmegaConf.from_dotlist(overrides)
    except (OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--set {' '.join(overrides)}: {_first_line(error)}") from None


def _reject_unknown(given: Any, where: str, schema: Any = RunConfig, prefix: str = "") -> None:
    """Raise for the first key that the schema lacks, naming its nearest neighbour."""
    known = {f.name: f for f in fields(schema)}
    for key in given:
        name = f"{prefix}{key}"
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"expected one of {', '.join(known)}"
            raise UserError(f"{where}: unknown key {name}; {hint}")
        factory: Any = known[key].default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            value = given[key]
            if not isinstance(value, DictConfig):
                raise UserError(f"{where}: {name} is {value!r}, expected a section of keys")
            _reject_unknown(value, where, factory, f"{name}.")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())
