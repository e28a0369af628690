"""What calibration costs at full size: seconds, memory and bytes of stages 1 to 5 on networks with random weights.

    python scripts/measure_calibration.py --out calibration.json                       # every system, one process each
    python scripts/measure_calibration.py --out calibration.json --only stable_diffusion --set method=paper

Nothing is downloaded: the networks, the text encoder and a tokenizer of letters are made here, with the settings of
configs/*.yaml; times and memory do not depend on what the weights are. A system that the JSON file holds for the same
settings is not run again, and an interrupted one goes on behind its last finished stage. Bars: Stable Diffusion under 600 s
and 16 GB of host memory, DPS for ImageNet under 5 s beside the trajectories. Host memory is the process's peak so far.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cachequant.config import RunConfig, load_config, repository_folder
from cachequant.models.loading import torch_device
from cachequant.pipeline.context import Context
from cachequant.pipeline.stages import Stages
from cachequant.storage import content_hash, load_json, save_json

Sizes = dict[str, Any]
SCALED = ("samples", "dps_samples", "dec_samples", "refresh_inputs", "cached_inputs")


def stable_diffusion(tiny: bool) -> Any:
    """Stable Diffusion v1.4: U-Net of 860 M parameters, CLIP's text tower, KL-f8, PLMS."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer, vocabulary = letter_tokenizer()
    width = 16 if tiny else 768
    text = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=1 if tiny else 12,
        num_attention_heads=2 if tiny else 12, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1,
    )  # fmt: skip
    sizes: Sizes = {"block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4} if tiny else {}
    unet = UNet2DConditionModel(
        8 if tiny else 64, attention_head_dim=2 if tiny else 8, cross_attention_dim=width, **sizes
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=_first_stage(AutoencoderKL, tiny, levels=4, latent_channels=4), text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer, unet=unet.eval(), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def imagenet(tiny: bool) -> Any:
    """LDM-4 on ImageNet: U-Net of 400 M parameters with a class token, VQ-f4, DDIM."""
    from diffusers import DDIMScheduler, UNet2DConditionModel, VQModel

    from cachequant.models.pipelines import ClassConditionalLDMPipeline, ClassEmbedder

    cross, width = "CrossAttn", 16 if tiny else 512
    sizes: Sizes = {"norm_num_groups": 4} if tiny else {}
    unet = UNet2DConditionModel(
        8 if tiny else 64, 3, 3, block_out_channels=(8, 16, 16, 16) if tiny else (192, 384, 576, 960),
        down_block_types=("DownBlock2D", *[f"{cross}DownBlock2D"] * 3), cross_attention_dim=width, attention_head_dim=1,
        up_block_types=(*[f"{cross}UpBlock2D"] * 3, "UpBlock2D"), **sizes,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    codes: Sizes = {"num_vq_embeddings": 16 if tiny else 8192, "vq_embed_dim": 3}
    return ClassConditionalLDMPipeline(
        _first_stage(VQModel, tiny, levels=3, latent_channels=3, **codes), unet.eval(), ClassEmbedder(1000, width), scheduler
    )  # fmt: skip


def dit(tiny: bool) -> Any:
    """DiT-XL/2 at 256×256: 28 blocks of width 1152, learned sigma, KL-f8, DDIM."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    sizes: Sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8} if tiny else {}
    transformer = DiTTransformer2DModel(out_channels=8, **sizes)
    return DiTPipeline(
        transformer.eval(), _first_stage(AutoencoderKL, tiny, levels=4, latent_channels=4),
        DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False),
    )  # fmt: skip


SYSTEMS: dict[str, Callable[[bool], Any]] = {"stable_diffusion": stable_diffusion, "imagenet": imagenet, "dit": dit}


def _first_stage(kind: Any, tiny: bool, levels: int, **kwargs: Any) -> Any:
    widths = (8,) * levels if tiny else (128, 256, 512, 512)[:levels]
    sizes: Sizes = {"norm_num_groups": 4, "layers_per_block": 1} if tiny else {"layers_per_block": 2}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return kind(block_out_channels=widths, **blocks, **sizes, **kwargs).eval()


def letter_tokenizer() -> tuple[Any, int]:
    """CLIP's tokenizer with a vocabulary of single letters, and the size of that vocabulary."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77), len(words)


def configuration(name: str, args: argparse.Namespace) -> RunConfig:
    """The system's own YAML, with smaller calibration sets where `--scale` asks for them."""
    config = load_config(repository_folder() / "configs" / f"{name}.yaml", args.set)
    for key in SCALED:
        full = getattr(config.calibration, key)
        if full is not None:
            setattr(config.calibration, key, max(2, round(full * args.scale)))
    return config


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Build one system and run its stages; seconds are those of the run that computed a stage."""
    device = torch_device(args.device)
    begin = time.perf_counter()
    torch.manual_seed(0)
    with device:  # weights are drawn where they are used
        pipe = SYSTEMS[name](args.tiny)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # its tables belong on the host
    stages = Stages.at(Context.of(pipe.to(device), configuration(name, args)), args.work / name)
    record: dict[str, Any] = {"build_seconds": time.perf_counter() - begin, "stages": {}}
    steps = {
        "1 calibrate": stages.calibration, "1 schedule": stages.schedule, "2 features": stages.moments,
        "3 dec cache": stages.cache_correction, "4 integer weights": stages.weights, "4 quant params": stages.quant,
        "5 dec quant": stages.correction,
    }  # fmt: skip
    for label, run in steps.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        _, key = run()
        record["stages"][label] = _cost(stages.store.root, key, device)
    calibration, _ = stages.calibration()
    plan, (schedule, _) = stages.save_plan(), stages.schedule()
    return record | {
        "total_seconds": sum(stage["seconds"] for stage in record["stages"].values()),
        "dps_seconds": calibration.measured["dps_seconds"],
        "trajectories_seconds": calibration.measured["trajectories_seconds"],
        "gpu_bytes": max(stage["gpu_bytes"] for stage in record["stages"].values()),
        "host_bytes": _host_bytes(),
        "plan_bytes": _bytes(plan),
        "evaluations": schedule.num_steps,
        "refreshes": len(schedule.refresh_steps),
    }


def _cost(root: Path, key: str, device: torch.device) -> dict[str, float]:
    folder = next(root.glob(f"*-{key[:12]}"))
    gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    seconds = load_json(folder / "done.json")["seconds"]
    return {"seconds": seconds, "gpu_bytes": gpu, "host_bytes": _host_bytes(), "bytes": _bytes(folder)}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _host_bytes() -> int:
    """Most resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(systems: dict[str, Any]) -> str:
    """A line per system and stage."""
    lines = [f"{'system':20} {'stage':18} {'seconds':>9} {'GPU GB':>7} {'host GB':>8} {'MB on disk':>11}"]
    for name, record in systems.items():
        rows = {**record["stages"], "all, with the plan": {**record, "seconds": record["total_seconds"]}}
        for label, row in rows.items():
            disk = row.get("bytes", row.get("plan_bytes", 0)) / 1e6
            memory = f"{row['gpu_bytes'] / 1e9:7.2f} {row['host_bytes'] / 1e9:8.2f}"
            lines.append(f"{name:20} {label:18} {row['seconds']:9.1f} {memory} {disk:11.1f}")
        dps, paths = record["dps_seconds"], record["trajectories_seconds"]
        lines.append(f"{name:20} DPS {dps:.2f} s beside {paths:.1f} s of trajectories")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, read first to skip what it holds")
    parser.add_argument("--work", type=Path, help="folder of the stages' outputs, default beside --out")
    parser.add_argument("--only", choices=tuple(SYSTEMS), help="one system, in this process")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a configuration key")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the calibration sets, for a dry run")
    parser.add_argument("--tiny", action="store_true", help="networks of a few channels, to test this script")
    parser.add_argument(
        "--tf32", action="store_true", help="TF32 in matrix products; torch has it on in convolutions alone"
    )
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    args.work = args.work or args.out.with_suffix("")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, print everything."""
    args = parse(argv)
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    key = content_hash([args.set, args.scale, args.tiny, args.tf32, str(torch_device(args.device))])[:12]
    record = load_json(args.out) if args.out.is_file() else {"runs": {}}
    for name in [args.only] if args.only else SYSTEMS:
        if name in record["runs"].get(key, {}).get("systems", {}):
            continue
        if args.only is None:  # a process of its own, so that peaks are its own
            command = [sys.executable, __file__, *(argv if argv is not None else sys.argv[1:]), "--only", name]
            if code := subprocess.run(command, check=False).returncode:
                return code
            record = load_json(args.out)
            continue
        run = record["runs"].setdefault(key, {"settings": settings(args), "systems": {}})
        run["systems"][name] = measure(name, args)
        save_json(args.out, record)
    print(table(record["runs"][key]["systems"]))
    return 0


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on besides the system."""
    cuda = torch_device(args.device).type == "cuda"
    return {
        "set": args.set, "scale": args.scale, "tiny": args.tiny, "matmul_tf32": args.tf32,
        "convolution_tf32": torch.backends.cudnn.allow_tf32, "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if cuda else platform.machine(), "torch": torch.__version__,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
