"""What does MiniMax-M2 cost at its full width: as many of its FP8 layers as the disk holds, from cold disk to verified output?

    python benchmarks/full_size.py make FOLDER [--layers 8] [--tokens 2000000]
    python benchmarks/full_size.py chain FOLDER OUT [--json FILE]        observe, plan, prune and verify by their commands, caches dropped
    python benchmarks/full_size.py prune FOLDER OUT [--rounds 3] [--cached]   `prune` against `cp` of its output, `verify` against `dd`;
                                                                         no GPU; caches dropped, or what is read first read into them
    python benchmarks/full_size.py fetch FOLDER                          one layer from cached files to the GPU, by 1, 4 and 8 threads
    python benchmarks/full_size.py cap FOLDER [--device-gb 24]           the device's memory capped, the host's sampled
    python benchmarks/full_size.py reroute FOLDER [--rounds 4]           what gathering a sample of tokens adds, 32,768 of 16 million
    torchrun --nproc-per-node N benchmarks/full_size.py ranks FOLDER [--tokens 6000000]     one run over N GPUs, timed between barriers

`make` writes random weights of the real shapes, names and dtypes (embeddings and vocabulary too) and text of random tokens in documents of
2,048. `chain` prints what each command took, the rates behind it, and what they come to for 62 layers and 16 million tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inventories import Tensor, minimax_m2
from observe_memory import write_tokenizer
from reapkit.tensors import encode_header

LENGTH, WORDS = 2048, 200_064
FULL_LAYERS, FULL_TOKENS, FULL_BYTES = 62, 16_000_000, 230e9
# Of which so many are sampled for re-routed errors.
FULL_SAMPLE = 32_768
# What the activation budget holds on a card of 80 GB: a wave.
WAVE_TOKENS = 3_800_000


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("make")
    step.add_argument("folder", type=Path)
    step.add_argument("--layers", type=int, default=8)
    step.add_argument("--tokens", type=int, default=2_000_000)
    step = steps.add_parser("chain")
    step.add_argument("folder", type=Path)
    step.add_argument("out", type=Path)
    step.add_argument("--json", type=Path, dest="report", metavar="FILE")
    step = steps.add_parser("prune")
    step.add_argument("folder", type=Path)
    step.add_argument("out", type=Path)
    step.add_argument("--rounds", type=int, default=3)
    step.add_argument("--cached", action="store_true", help="as where memory holds all of it and it was just used")
    step.add_argument("--json", type=Path, dest="report", metavar="FILE")
    step = steps.add_parser("cap")
    step.add_argument("folder", type=Path)
    step.add_argument("--device-gb", type=float, default=24.0)
    step.add_argument("--samples", type=int, default=128)
    step = steps.add_parser("fetch")
    step.add_argument("folder", type=Path)
    step = steps.add_parser("ranks")
    step.add_argument("folder", type=Path)
    step.add_argument(
        "--tokens", type=int, help="drawn at random, in place of the text, so that no time goes into tokenising"
    )
    step = steps.add_parser("reroute")
    step.add_argument("folder", type=Path)
    step.add_argument("--tokens", type=int, default=2_000_000, help="drawn at random, in place of the text")
    step.add_argument("--rounds", type=int, default=4)
    step.add_argument("--json", type=Path, dest="report", metavar="FILE")
    for name in ("chain", "fetch", "cap", "ranks", "reroute"):
        steps.choices[name].add_argument("--dtype", default="bfloat16", help="of the computation, or float8")
    arguments = vars(parser.parse_args())
    {"make": make, "chain": chain, "prune": prune, "fetch": fetch, "cap": cap, "ranks": ranks, "reroute": reroute}[
        arguments.pop("step")
    ](**arguments)
    return 0


# ---- the model and the text


def make(folder: Path, layers: int, tokens: int) -> None:
    import torch

    config, tensors, num_shards = minimax_m2(layers)
    config |= {
        "architectures": ["MiniMaxM2ForCausalLM"], "dtype": "bfloat16", "vocab_size": WORDS, "hidden_size": 3072,
        "intermediate_size": 1536, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "rotary_dim": 64,
        "rope_theta": 5_000_000, "rms_norm_eps": 1e-6, "max_position_embeddings": 196_608, "use_routing_bias": True,
        "scoring_func": "sigmoid", "use_qk_norm": True, "tie_word_embeddings": False, "hidden_act": "silu",
        "quantization_config": {
            "quant_method": "fp8", "fmt": "float8_e4m3fn", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        },
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def values(name: str, dtype: str, shape: tuple[int, ...]) -> Any:
        if name.endswith("norm.weight"):
            result = torch.ones(shape, device=device)
        elif name.endswith("_scale_inv"):  # with weights of unit variance: that of a linear layer's inputs stays
            result = torch.full(shape, (shape[1] * 128) ** -0.5, device=device)
        else:
            result = torch.randn(shape, device=device, generator=generator)
            if dtype != "F8_E4M3":
                result *= 0.01 if name.endswith("bias") else shape[-1] ** -0.5
        return result.to({"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F32": torch.float32}[dtype])

    size = -(-len(tensors) // num_shards)
    weight_map: dict[str, str] = {}
    for number in range(num_shards):
        part: list[Tensor] = tensors[number * size : (number + 1) * size]
        file = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(encode_header(part, metadata={"format": "pt"}))
            for name, dtype, shape in part:
                stream.write(values(name, dtype, shape).view(torch.uint8).cpu().numpy().data)
        weight_map |= {name: file for name, _, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_tokenizer(folder, WORDS)
    words = random.Random(0)
    with (folder / "text.jsonl").open("w") as stream:
        for number in range(-(-tokens // LENGTH)):
            text = " ".join(str(words.randrange(2, WORDS)) for _ in range(LENGTH))
            stream.write(json.dumps({"text": text, "domain": f"d{number % 4}"}) + "\n")


# ---- from cold disk to verified output


def chain(folder: Path, out: Path, dtype: str, report: Path | None) -> None:
    figures: dict[str, Any] = {"cold": drop_caches(), "disk_bytes_per_second": disk_rate(folder), "dtype": dtype}
    layers = read(folder / "config.json")["num_hidden_layers"]
    stats, plan = out.with_name(f"{out.name}.safetensors"), out.with_name(f"{out.name}.json")
    text = str(folder / "text.jsonl")
    commands = {
        "observe": ["observe", folder, "--data", text, "--dtype", dtype, "-o", stats, "-q"],
        "plan": ["plan", stats, "--ratio", "0.30", "-o", plan, "-q"],
        "prune": ["prune", folder, plan, "-o", out, "-q"],
        "verify": ["verify", out, "--source", folder, "-q"],
    }
    for name, command in commands.items():
        drop_caches()
        figures[name] = timed(*command)
        print(
            f"{name:30} {figures[name]['seconds']:8.1f} s   {figures[name]['peak_bytes'] / 1e9:6.2f} GB of host memory"
        )
    drop_caches()
    figures["cp and sync"] = copied(out)
    print(f"{'cp and sync':30} {figures['cp and sync']['seconds']:8.1f} s")
    drop_caches()
    figures["run, cold"] = cold = inside(folder, dtype)
    figures["run"] = run = inside(folder, dtype)
    source = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    figures |= {"layers": layers, "source_bytes": source, "written_bytes": written}
    per_layer = run["tokens"] * layers / run["seconds"]
    share = FULL_BYTES / source
    # What happens once a wave and what happens once a layer are told apart, since these few layers are a wave too short.
    cold_wave = cold["first_layer_seconds"] + (FULL_LAYERS - 1) * cold["layer_seconds"]
    parts = {
        "observe": FULL_TOKENS * cold["waves"] / cold["tokens"] * cold_wave,
        "prune": figures["prune"]["seconds"] * share,
        "verify": figures["verify"]["seconds"] * share,
    }
    figures |= {"tokens_times_layers_per_second": per_layer, "for_all_layers_seconds": parts}
    rate, kind = figures["disk_bytes_per_second"], "cold" if figures["cold"] else "possibly cached"
    print(
        f"{source / 1e9:.1f} GB in {layers} layers, {written / 1e9:.1f} GB written; disk {rate / 1e9:.2f} GB/s ({kind})"
    )
    print(f"{run['tokens']:,} tokens in {run['waves']} waves, {run['place']}: {run['seconds']:.1f} s with files cached, "
          f"{per_layer / 1e6:.3f}M tokens/s a layer; reading cold alone takes {run['read_bytes'] / rate:.1f} s")  # fmt: skip
    print(f"the same cold: {cold['seconds']:.1f} s, {cold['first_layer_seconds']:.1f} s of them up to the end of the first layer, "
          f"then {cold['layer_seconds']:.2f} s a layer; with files cached {run['layer_seconds']:.2f} s")  # fmt: skip
    reading, computing = FULL_BYTES / rate, FULL_LAYERS * run["layer_seconds"]
    figures["wave_against_larger"] = cold_wave / max(reading, computing)
    print(f"a cold wave through {FULL_LAYERS} layers: {cold_wave:.0f} s, {figures['wave_against_larger']:.2f} times the larger of reading, "
          f"{reading:.0f} s, and computing, {computing:.0f} s")  # fmt: skip
    ratio = figures["prune"]["seconds"] / figures["cp and sync"]["seconds"]
    print(f"prune took {ratio:.2f} times as long as cp of what it wrote")
    minutes = {name: round(seconds / 60, 1) for name, seconds in parts.items()}
    print(
        f"for {FULL_LAYERS} layers and {FULL_TOKENS:,} tokens: {minutes}, together {sum(parts.values()) / 60:.1f} minutes"
    )
    if report is not None:
        report.write_text(json.dumps(figures, indent=2) + "\n")


def prune(folder: Path, out: Path, rounds: int, cached: bool, report: Path | None) -> None:
    """Which experts go does not matter to the disk: a plan at random, which needs no statistics."""
    plan = out.with_name(f"{out.name}.json")
    timed("plan", folder, "--criterion", "random", "--ratio", "0.30", "-o", plan, "-q")
    seconds: dict[str, list[float]] = {"prune": [], "cp": [], "verify": [], "read": []}
    peaks = {"prune": 0.0, "verify": 0.0}
    for _ in range(rounds + 1):  # the first, which is not counted, writes where a virtual disk has never been written
        shutil.rmtree(out, ignore_errors=True)
        steps: dict[str, Callable[[], dict[str, float]]] = {
            "prune": lambda: timed("prune", folder, plan, "-o", out, "-q"),
            "cp": lambda: copied(out),
            "verify": lambda: timed("verify", out, "--source", folder, "-q"),
            "read": lambda: read_in_turn(out, folder),
        }
        for name, step in steps.items():
            hold_memory(folder, out)
            cold = drop_caches() and not cached
            if cached:
                hold_memory(*{"prune": (folder,), "cp": (out,)}.get(name, (folder, out)))
            taken = step()
            seconds[name].append(taken["seconds"])
            if name in peaks:
                peaks[name] = max(peaks[name], taken["peak_bytes"])
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    figures: dict[str, Any] = {"written_bytes": written, "cold": cold, "seconds": seconds, "peak_bytes": peaks}
    for mine, theirs, what in (("prune", "cp", "cp and sync"), ("verify", "read", "reading the same bytes in turn")):
        pairs = zip(seconds[mine], seconds[theirs], strict=True)
        uncounted, *ratios = figures[f"{mine} / {theirs}"] = [one / other for one, other in pairs]
        print(
            f"{written / 1e9:.1f} GB: {mine} {', '.join(f'{value:.1f}' for value in seconds[mine][1:])} s, "
            f"{what} {', '.join(f'{value:.1f}' for value in seconds[theirs][1:])} s: "
            f"{min(ratios):.2f} to {max(ratios):.2f} times, in the round before {uncounted:.2f}; "
            f"{peaks[mine] / 1e6:.0f} MB of memory"
        )
    if report is not None:
        report.write_text(json.dumps(figures, indent=2) + "\n")


def hold_memory(*folders: Path) -> None:
    """Fill the page cache, so that what is timed next, once it is dropped, finds as much memory as what was timed before.

    A virtual machine may give memory that is free for some seconds back to its host, and takes 2 or 3 times as long over each page that it
    then uses again.
    """
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            read_file(path)


def read_file(path: Path, count: int | None = None) -> None:
    """Read a file from its beginning, all of it or so many bytes."""
    limit = [] if count is None else ["iflag=count_bytes", f"count={count}"]
    subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none", *limit], check=True)


def read_in_turn(out: Path, folder: Path) -> dict[str, float]:
    """The output's files one after the other, then as many bytes of the source's: what `verify` has to read at least."""
    left = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    begun = time.perf_counter()
    for path in sorted(out.glob("*.safetensors")):
        read_file(path)
    for path in sorted(folder.glob("*.safetensors")):
        count = min(left, path.stat().st_size)
        read_file(path, count)
        left -= count
    return {"seconds": time.perf_counter() - begun}


def inside(folder: Path, dtype: str) -> dict[str, Any]:
    """The observation of a wave alone, without starting the process and reading the text."""
    command = [sys.executable, __file__, "ranks", str(folder), "--tokens", str(WAVE_TOKENS), "--dtype", dtype]
    reply = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(reply.splitlines()[-1]))


def timed(*command: object) -> dict[str, float]:
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "reapkit", *map(str, command)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} ended with {status}")
    return {"seconds": time.perf_counter() - begun, "peak_bytes": usage.ru_maxrss * 1024}


def copied(out: Path) -> dict[str, float]:
    """`cp` of the same bytes on the same disk, until they are on it, as `prune` waits for them."""
    copy = out.with_name(out.name + "-copy")
    begun = time.perf_counter()
    subprocess.run(["cp", "-r", str(out), str(copy)], check=True)
    subprocess.run(["sync", "-f", str(copy)], check=True)
    seconds = time.perf_counter() - begun
    shutil.rmtree(copy)
    return {"seconds": seconds}


def drop_caches() -> bool:
    """Make the next reading cold, where that is allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def disk_rate(folder: Path) -> float:
    """Bytes a second of 16 GiB, or of all there is, read by one thread from the shards in their order."""
    begun, total = time.perf_counter(), 0
    for path in sorted(folder.glob("*.safetensors")):
        if total < 16 << 30:
            read_file(path)
            total += path.stat().st_size
    return total / (time.perf_counter() - begun)


# ---- one layer


def fetch(folder: Path, dtype: str) -> None:
    import torch

    from reapkit import layout, modules
    from reapkit.architectures import ARCHITECTURES
    from reapkit.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    resolved = layout.resolve(checkpoint, ARCHITECTURES)
    device = torch.device("cuda", 0)
    model = modules.StreamedModel(checkpoint, resolved, device=device, dtype=torch.bfloat16, fp8=dtype == "float8")
    model.fetch(1)  # fills the cache, and compiles
    for readers in (1, 4, 8):
        modules._READERS = readers
        begun = time.perf_counter()
        model.fetch(1)
        print(f"{readers} threads: {time.perf_counter() - begun:.2f} s")


# ---- under a cap


def cap(folder: Path, device_gb: float, samples: int, dtype: str) -> None:
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # as the command line sets it
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(device_gb * 1e9 / total)
    from reapkit.observation import Observation, Run

    data = [f"{folder / 'text.jsonl'}:{samples}"]
    observation = Observation(folder, data, run=Run(dtype=dtype), max_length=LENGTH, seed=0)
    with HostMemory() as host:
        begun = time.perf_counter()
        result = observation.run()
        seconds = time.perf_counter() - begun
    figures = {
        "device_cap_bytes": device_gb * 1e9, "device_peak_bytes": torch.cuda.max_memory_reserved(),
        "device_allocated_bytes": torch.cuda.max_memory_allocated(), "estimated_bytes": sum(observation.memory().values()),
        "memory": observation.memory(), "host_peak_bytes": host.peak, "host_before_bytes": host.before,
        "place": observation.place, "waves": len(observation.waves), "tokens": result.num_tokens,
        "tokens_per_batch": max(batch.input_ids_BT.size for batch in observation.batches), "seconds": seconds,
    }  # fmt: skip
    print(json.dumps(figures))
    assert figures["device_peak_bytes"] <= device_gb * 1e9


class HostMemory:
    """The largest resident memory of this process that is not file pages, sampled."""

    def __enter__(self) -> HostMemory:
        self.before = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return sum(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


# ---- a sample of tokens beside it


def reroute(folder: Path, tokens: int, rounds: int, dtype: str, report: Path | None) -> None:
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # as the command line sets it
    import torch

    from reapkit import observation as module
    from reapkit.observation import Observation, Run
    from reapkit.rerouting import Reroute

    drawn = drawn_text(tokens)
    module.load = lambda *_, **__: drawn  # type: ignore[assignment]
    sampled = round(FULL_SAMPLE / FULL_TOKENS * tokens)
    runs: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for number in range(rounds + 1):
        for name, rate in (("without", None), ("with", Reroute(sampled))):
            observation = Observation(
                folder, [str(folder / "text.jsonl")], run=Run(dtype=dtype), max_length=LENGTH, seed=0, reroute=rate
            )
            sample = folder.with_name(f"{folder.name}.sample.safetensors")
            _, timings = observed(observation, sample=sample if rate is not None else None)
            sample.unlink(missing_ok=True)
            if number:  # the first of each reads files and compiles kernels
                runs[name].append(timings)

    def added(what: str) -> float:
        with_it, without = (statistics.median(run[what] for run in runs[name]) for name in ("with", "without"))
        return with_it / without - 1

    figures = {
        "device": torch.cuda.get_device_name(), "dtype": dtype, "tokens": tokens, "sampled": sampled, "runs": runs,
        "layers": read(folder / "config.json")["num_hidden_layers"], "waves": len(observation.waves),
        "added": added("seconds"), "added_per_layer": added("layer_seconds"),
    }  # fmt: skip
    print(json.dumps(figures))
    if report is not None:
        report.write_text(json.dumps(figures, indent=2) + "\n")


# ---- several GPUs


def ranks(folder: Path, tokens: int | None, dtype: str) -> None:
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # as the command line sets it
    from reapkit import observation as module
    from reapkit.observation import Observation, Run
    from reapkit.ranks import Ranks

    if tokens is not None:
        drawn = drawn_text(tokens)
        module.load = lambda *_, **__: drawn  # type: ignore[assignment]

    own = Ranks.from_environment()
    run = Run(dtype=dtype)
    observation = Observation(folder, [str(folder / "text.jsonl")], run=run, max_length=LENGTH, seed=0, ranks=own)
    with own.joined():
        own.wait()
        result, timings = observed(observation, wait=own.wait)
    if own.rank == 0:
        print(json.dumps({
            "ranks": own.count, "tokens": result.num_tokens, "waves": len(observation.waves), "place": observation.place,
            "read_bytes": observation.model.nbytes_per_pass * len(observation.waves), **timings,
        }))  # fmt: skip
        result.save(folder.with_name(f"{folder.name}.ranks-{own.count}"))


def observed(
    observation: Any, *, sample: Path | None = None, wait: Callable[[], None] = lambda: None
) -> tuple[Any, dict[str, float]]:
    """The statistics, and the seconds that they took: in all, to the end of the first layer, and for each layer of the second half of the
    first wave, when a disk that is slower than computing has used up what it was ahead at first."""
    layers = len(observation.model.layers)
    wave = sum(int(batch.length_B.sum()) for batch in observation.waves[0])
    ends: list[float] = []

    def watch(_: str, done: float, total: float, unit: str) -> None:
        """When each layer had seen all of the first wave."""
        while len(ends) < min(layers, done // wave):
            ends.append(time.perf_counter())

    begun = time.perf_counter()
    result = observation.run(progress=watch, **({} if sample is None else {"sample": sample}))
    wait()
    seconds = time.perf_counter() - begun
    middle = (layers - 1) // 2
    per_layer = (ends[-1] - ends[middle]) / (layers - 1 - middle)
    return result, {
        "seconds": seconds, "first_layer_seconds": ends[0] - begun, "layer_seconds": per_layer,
        "layer_ends_seconds": [round(end - begun, 2) for end in ends],
    }  # fmt: skip


def drawn_text(tokens: int) -> Any:
    """Documents of random tokens in four domains."""
    import numpy as np

    from reapkit.calibration import CalibrationData, Document

    random_ids = np.random.default_rng(0)
    documents = tuple(
        Document(random_ids.integers(2, WORDS, LENGTH, dtype=np.int32), f"d{number % 4}", number)
        for number in range(-(-tokens // LENGTH))
    )
    return CalibrationData(documents, ("d0", "d1", "d2", "d3"), f"drawn {tokens}", ())


def read(path: Path) -> Any:
    return json.loads(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
