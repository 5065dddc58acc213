"""How cost grows, and what it comes to on 64 GPUs and for a million evaluation images: computed from result files.

What no result file holds is a constant here, from a data sheet, and the text says so.
"""

from __future__ import annotations

from typing import Any

from tools.bench.document import fitting
from tools.bench.growth_tables import Results, dimensions, ranks, table
from tools.bench.targets import MEMORY_BYTES

NUM_GPUS, GPUS_PER_NODE = 64, 8
NUM_IMAGES = 1_000_000
# NVIDIA H100 SXM data sheet: dense bfloat16, and a 400 Gb/s network port for each GPU.
H100_FLOP_PER_SEC, NETWORK_BYTES_PER_SEC = 989e12, 50e9
MFU = (0.35, 0.45)  # the target and the aim
HALF = 0.5
GRADIENT_BYTES = 4  # float32 master weights
FEATURES, DOUBLE = 2048, 8


def growth(found: Results) -> str:
    """The section's text; of what is there."""
    text = ["## How cost grows\n", dimensions(found), ranks(found)]
    count = next((c for c in found.values() if c.get("what") == "count"), None)
    if count is None:
        return "\n".join([*text, "The arithmetic of full-size steps was not counted.\n"])
    return "\n".join([*text, _counts(count), _training(count, found), _evaluation(count, found)])


def _counts(count: dict[str, Any]) -> str:
    heads = ("", "batch", "TFLOP, plain", "TFLOP, rgbench", "TFLOP per image", "student", "least seconds on one H100",
             "held (GB)")  # fmt: skip
    body = []
    for row in _steps(count):
        ours, plain = row["steps"]["rgbench"]["flops"], row["steps"]["plain"]["flops"]
        cells = (f"{row['batch_size']}", f"{plain / 1e12:.1f}", f"{ours / 1e12:.1f}",
                 f"{ours / 1e12 / row['batch_size']:.2f}", f"{row['student_parameters'] / 1e6:.0f} M",
                 f"{ours / H100_FLOP_PER_SEC:.3f}", f"{_held(row) / 1e9:.1f}")  # fmt: skip
        body.append((row["method"], *cells))
    return (
        f"Full-size arithmetic, {count['preset']} at {_steps(count)[0]['resolution']} px, counted on shapes alone "
        f"(`{count['command']}`). Least seconds are FLOPs over the data sheet's dense bfloat16 rate, "
        f"{H100_FLOP_PER_SEC / 1e12:.0f} TFLOP/s: no implementation of these operations is faster. Held is what "
        "stays on the GPU from step to step whatever the batch: all networks, the gradients and AdamW's moments in "
        "float32.\n\n" + table(heads, body) + "\n" + _small_card(count)
    )


def _held(row: dict[str, Any]) -> int:
    return int(row["held_bytes"]["networks"] + row["held_bytes"]["learning"])


def _small_card(count: dict[str, Any]) -> str:
    """Whether RG-LCD can fit a card of 24 GB at any batch, by what it holds."""
    row = next((row for row in _steps(count) if row["method"] == "rg_lcd"), None)
    if row is None:
        return ""
    held, learning = _held(row), row["held_bytes"]["learning"]
    fits = held <= MEMORY_BYTES
    verdict = "leaves room for activations on" if fits else "cannot fit, at any batch,"
    return (
        f"RG-LCD of a whole UNet holds {held / 1e9:.1f} GB before any activation, {learning / 1e9:.1f} GB of it "
        f"gradients and moments: it {verdict} a card of {MEMORY_BYTES / 1e9:g} GB"
        + ("" if fits else "; adapters (`lora: {rank: 64}`) learn little and share the frozen weights")
        + ".\n"
    )


def _steps(count: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in count["rows"] if "steps" in row]


def _training(count: dict[str, Any], found: Results) -> str:
    """What bounds training on many GPUs."""
    lines, shares = [f"### Training on {NUM_GPUS} GPUs\n"], []
    for row in _steps(count):
        size = row["batch_size"]
        flops, gradient = row["steps"]["rgbench"]["flops"], GRADIENT_BYTES * row["student_parameters"]
        sent = 2 * (NUM_GPUS - 1) / NUM_GPUS * gradient
        exchange = sent / NETWORK_BYTES_PER_SEC
        slow, fast = (flops / H100_FLOP_PER_SEC / share for share in MFU)
        shares.append(exchange / (exchange + fast))
        rates = [NUM_GPUS * size / (seconds + exchange) for seconds in (slow, fast)]
        lines.append(
            f"- {row['method']}: {size} images on each GPU take {fast:.2f} to {slow:.2f} s at {100 * MFU[1]:.0f} to "
            f"{100 * MFU[0]:.0f} % of the rate. A ring all-reduce of the float32 gradient ({gradient / 1e9:.2f} GB) "
            f"sends {sent / 1e9:.2f} GB from each GPU, {exchange:.2f} s at {NETWORK_BYTES_PER_SEC / 1e9:.0f} GB/s: "
            f"{100 * shares[-1]:.0f} % of a step that does not overlap the two, and half of it at "
            f"{size * exchange / fast:.1f} images on each GPU. {NUM_GPUS} GPUs then train on {rates[0]:.0f} to "
            f"{rates[1]:.0f} images a second."
        )
    lines.append(_feeding(count, found))
    bottleneck = "the exchange" if max(shares) > HALF else "arithmetic"
    lines.append(
        f"\nAt {_steps(count)[0]['batch_size']} images on each GPU the exchange takes {100 * max(shares):.0f} % "
        f"of a step at most, if nothing overlaps: the bottleneck is {bottleneck}, "
        "until a GPU has no more images than the number named above. `rgbench` sums "
        "gradients after the backward pass, in a layout that no restart changes, so that a resumed run repeats the "
        "uninterrupted one; where the exchange dominates, DistributedDataParallel (or FSDP2 for models that do not "
        "fit) overlaps it with the backward pass and takes over, at the price of that exactness. Generation exchanges "
        "nothing: its shards are static.\n"
    )
    return "\n".join(lines)


def _feeding(count: dict[str, Any], found: Results) -> str:
    """Cores that decode what the GPUs eat."""
    data = next((c for c in found.values() if c.get("what") == "data"), None)
    lcd = next((row for row in _steps(count) if row["method"] == "lcd"), None)
    if data is None or lcd is None:
        return "- The rate of decoding was not measured."
    measured = data["rows"][0]
    each = measured["images_per_sec"]["rgbench"] / measured["cores"]
    eaten = lcd["batch_size"] * H100_FLOP_PER_SEC * MFU[1] / lcd["steps"]["rgbench"]["flops"]
    return (
        f"- Data: one such GPU eats {eaten:.0f} images a second in LCD; one core of {data['machine']['device']} "
        f"decodes {each:.0f}. So {eaten / each:.1f} cores feed a GPU, {GPUS_PER_NODE * eaten / each:.0f} a node of "
        f"{GPUS_PER_NODE}. A latents cache needs none of them."
    )


def _evaluation(count: dict[str, Any], found: Results) -> str:
    """What bounds an evaluation of a million images."""
    lines = [f"### {NUM_IMAGES:,} evaluation images\n"]
    made = next((row for row in count["rows"] if row["method"] == "generate"), None)
    if made is not None:
        total = made["flops"] * NUM_IMAGES
        hours = total / H100_FLOP_PER_SEC / MFU[0] / 3600
        lines.append(
            f"- Generation, {made['steps_per_image']} steps at {made['resolution']} px: {made['flops'] / 1e12:.2f} "
            f"TFLOP an image, {hours:.1f} GPU hours at {100 * MFU[0]:.0f} % of the rate; {60 * hours / NUM_GPUS:.0f} "
            f"minutes on {NUM_GPUS} GPUs, since shards share nothing."
        )
    fid = next((c for c in found.values() if c.get("what") == "fid"), None)
    rate = _matmul_rate(found)
    gathering = 2 * NUM_IMAGES * FEATURES**2
    distances = 2 * NUM_IMAGES**2 * FEATURES
    memory = DOUBLE * FEATURES**2
    lines.append(
        f"- Fréchet distance: moments of {FEATURES} features are {memory / 2**20:.0f} MiB whatever the number of images"
        + (f"; gathering them takes {gathering / rate:.0f} s at this CPU's measured matmul rate" if rate else "")
        + (f"; the solve {fid['rows'][0]['solve']['seconds']['rgbench']['median']:.1f} s, once" if fid else "")
        + f". The rows themselves, kept on disk for the interval, are {4 * NUM_IMAGES * FEATURES / 1e9:.1f} GB."
    )
    lines.append(
        f"- Precision and recall compare all pairs: {distances / 1e15:.1f} PFLOP"
        + (f", {distances / rate / 3600:.0f} hours at this CPU's rate" if rate else "")
        + f", {distances / H100_FLOP_PER_SEC / MFU[0]:.0f} s on one H100 at {100 * MFU[0]:.0f} %. KID draws a fixed "
        "number of subsets and does not grow."
    )
    pairs = distances / H100_FLOP_PER_SEC / MFU[0] / 3600
    if made is not None:
        lines.append(
            f"\nThe bottleneck on GPUs is {'generation' if hours > pairs else 'the pairs of precision and recall'}: "
            f"{hours:.2f} GPU hours against {pairs:.4f}. Pairs alone grow with the square of the images, and on a CPU "
            "they are what takes longest: they belong on a GPU, or on the 10,000 to 50,000 images that the published "
            "protocols use. Static shards with `rgbench eval --shard` and `rgbench merge` carry everything else.\n"
        )
    return "\n".join(lines)


def _matmul_rate(found: Results) -> float | None:
    rates = [
        row["matmul_flop_per_sec"]["median"]
        for content in found.values()
        if content.get("what") == "train-step" and content["machine"]["device_type"] == "cpu"
        for row in fitting(content["rows"])
    ]
    return rates[0] if rates else None
