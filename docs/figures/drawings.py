"""The diagrams: what each shows is in its function's docstring."""

from collections.abc import Callable

from docs.figures.drawing import Drawing


def path(d: Drawing) -> None:
    """From recordings to samples: data set, VAE, latents, DiT, samples, and weights for PyTorch."""
    steps = [
        ("recordings", "mp4, webm, captions.csv", "gray"),
        ("data set", "ArrayRecord, columns, filters", "green"),
        ("latents", "encoded once by a frozen VAE", "green"),
        ("video DiT", "train, resume, evaluate", "blue"),
        ("samples, measures", "jvgen sample, jvgen evaluate", "orange"),
    ]
    commands = ["data build videos", "data build latents", "train", "sample"]
    for number, (name, note, fill) in enumerate(steps):
        d.box(20, 10 + 78 * number, 260, 50, f"{name}\n{note}", fill)
    for number, command in enumerate(commands):
        d.arrow((150, 60 + 78 * number), (150, 86 + 78 * number))
        d.text(162, 78 + 78 * number, command, size=13, color="faint")
    d.box(330, 130, 135, 90, "VAE\npublished, or\ntrained here", "purple")
    d.arrow((330, 190), (284, 190))
    d.box(330, 244, 135, 66, "PyTorch\nexport, verify", "purple")
    d.arrow((280, 269), (326, 269))


def batch(d: Drawing) -> None:
    """How a batch travels: the plan names records, each process reads its slots, the step runs on one global array."""
    d.box(20, 10, 440, 44, "plan(seed, step)\na record and a window for every slot of the batch", "orange")
    slots = ("blue", "blue", "green", "green", "blue", "green", "blue", "blue")
    for number, fill in enumerate(slots):
        d.box(20 + 55.5 * number, 78, 51, 30, f"slot {number}", fill, size=13)
        d.arrow((45 + 55.5 * number, 54), (45 + 55.5 * number, 75))
    for host in range(2):
        left = 20 + 222 * host
        d.box(
            left,
            132,
            217,
            92,
            f"process {host}\nGrain reads its slots, decodes,\nresizes, augments\nuint8 until the devices",
            "gray",
        )
        d.arrow((left + 108, 108), (left + 108, 129))
        d.arrow((left + 108, 224), (left + 108, 247))
    d.box(20, 250, 440, 44, "one global jax.Array per name\nsplit over the batch axes of the mesh", "green")
    d.arrow((240, 294), (240, 317))
    d.box(
        20,
        320,
        440,
        62,
        "jitted step: (state, batch) → (state, metrics)\nloss, gradients, optimizer, EMA\nwith donated state",
        "blue",
    )
    d.arrow((130, 382), (130, 405))
    d.arrow((350, 382), (350, 405))
    d.box(20, 408, 215, 44, "metrics.jsonl, hooks\na row per step", "gray")
    d.box(245, 408, 215, 44, "checkpoint\na checksum per array", "gray")


def plan(d: Drawing) -> None:
    """The plan of (seed, step): every cell of the table step by slot is computed on its own, at any step."""
    d.text(20, 22, "record that a slot reads", size=14, strong=True)
    d.text(460, 22, "colors: sources", size=13, color="faint", anchor="end")
    rows = [("0", 0), ("1", 1), ("2", 2), ("⋮", None), ("10⁶", 10**6), ("10⁶+1", 10**6 + 1)]
    for column in range(6):
        d.text(128 + 60 * column, 48, f"slot {column}", size=13, color="faint", anchor="middle")
    for number, (name, step) in enumerate(rows):
        top = 58 + 36 * number
        d.text(90, top + 20, name if step is None else f"step {name}", size=13, anchor="end")
        for column in range(6):
            if step is None:
                d.text(128 + 60 * column, top + 20, "⋮", anchor="middle")
                continue
            # Mixed digits, to look like a draw; the plan's own are in jvgen/data/stream/plan.py.
            mixed = (2654435761 * (step * 6 + column + 1)) % 2**32
            d.box(
                101 + 60 * column,
                top,
                54,
                29,
                str(mixed // 7 % 9000 + 1000),
                ("blue", "green", "blue")[mixed % 3],
                size=13,
            )
    d.box(
        20,
        284,
        440,
        84,
        "each cell is a function of seed, step and slot\nno state to save, nothing to replay on resume\n"
        "no dependence on the number of processes or workers\nthe stored state is the step and two hashes",
        "gray",
    )


def sharding(d: Drawing) -> None:
    """The sharding of one block: a kernel is stored in shards, gathered for its layer, its gradient scattered again."""
    d.text(20, 22, "one kernel [embed, mlp] on a mesh fsdp = 4", size=14, strong=True)
    fills = ("blue", "green", "orange", "purple")
    for device in range(4):
        left = 20 + 112 * device
        d.text(left + 50, 46, f"device {device}", size=13, color="faint", anchor="middle")
        for part in range(4):
            d.box(
                left,
                54 + 20 * part,
                100,
                20,
                fill=fills[part] if part == device else "none",
                dash=part != device,
                radius=0,
            )
        d.arrow((left + 50, 138), (left + 50, 186), color="strong")
        for part in range(4):
            d.box(left, 190 + 20 * part, 100, 20, fill=fills[part], radius=0)
        d.arrow((left + 50, 274), (left + 50, 294))
        d.box(left, 297, 100, 42, "product\nits rows", "gray")
        d.arrow((left + 50, 339), (left + 50, 387), color="warm")
        for part in range(4):
            d.box(
                left,
                391 + 20 * part,
                100,
                20,
                fill=fills[part] if part == device else "none",
                dash=part != device,
                radius=0,
            )
    d.box(130, 150, 220, 24, "all-gather, this layer only", "paper", line="strong", size=13)
    d.box(130, 351, 220, 24, "reduce-scatter of the gradient", "paper", line="warm", size=13)
    d.text(20, 496, "stored: parameters, moments, EMA in float32", size=13, color="faint")
    d.text(20, 516, "computed with: one layer at a time, in the compute dtype", size=13, color="faint")


def repvideo_gates(d: Drawing) -> None:
    """RepVideo: each layer reads its input mixed by a gate with the mean of the outputs since the group began."""
    d.text(20, 22, "what layer l reads", size=14, strong=True)
    d.text(290, 22, "averaged", size=13, color="faint", anchor="middle")
    d.text(410, 22, "gate", size=13, color="faint", anchor="middle")
    spans = [
        (0, 1, False),
        (1, 1, False),
        (2, 2, True),
        (3, 3, True),
        (4, 4, True),
        (5, 5, True),
        (6, 6, True),
        (7, 1, False),
        (8, 2, True),
    ]
    for layer, count, active in spans:
        top = 36 + 42 * layer
        first = layer == 0
        d.box(20, top, 150, 30, f"layer {layer}", "purple" if layer in (0, 7) or first else "blue")
        if not first:
            d.arrow((95, top - 12), (95, top - 2))
        for number in range(count):
            d.box(212 + 26 * number, top + 5, 22, 20, fill="green" if active else "gray", radius=2)
        d.circle(410, top + 15, 14, "orange" if active else "paper", "g" if active else "–")
        d.arrow((396, top + 15), (374, top + 15), head=False)
        d.arrow((206, top + 15), (174, top + 15))
    y = 36 + 42 * len(spans)
    d.arrow((95, y - 12), (95, y + 4))
    d.text(20, y + 26, "gray: one input, so the gate changes nothing", size=13, color="faint")
    d.text(20, y + 46, "the mean restarts after layers 0, 6, 12, ...", size=13, color="faint")
    d.text(20, y + 66, "of 30 gates 24 are active", size=13, color="faint")


def enhance(d: Drawing) -> None:
    """Enhance-A-Video: the share of attention between frames at one place decides one factor on the output."""
    d.text(20, 24, "attention among 5 frames at one place", size=14, strong=True)
    for row in range(5):
        for column in range(5):
            d.box(
                52 + 34 * column,
                44 + 34 * row,
                34,
                34,
                "d" if row == column else "",
                "gray" if row == column else "green",
                radius=0,
                size=13,
            )
        d.text(44, 66 + 34 * row, f"{row}", size=13, color="faint", anchor="end")
    d.arrow((232, 128), (266, 128))
    d.box(270, 92, 192, 72, "1 − mean of d\nhow much attention\ngoes across frames", "green")
    d.arrow((366, 164), (366, 190))
    d.box(270, 193, 192, 54, "one factor, at least 1\ntimes (F + τ) / (F − 1)", "orange")
    d.arrow((270, 220), (244, 220))
    d.box(52, 230, 190, 40, "output of attention", "blue")
    d.text(20, 298, "text rows keep their output; nothing is trained", size=13, color="faint")


def cv_vae(d: Drawing) -> None:
    """CV-VAE: the latents of a video encoder are read by the frozen image decoder, and those of the image encoder by
    the video decoder."""
    d.box(20, 20, 130, 56, "clip\n4n + 1 frames", "gray")
    d.box(20, 220, 130, 56, "image\nor one frame of 4", "gray")
    d.box(20, 108, 130, 40, "video encoder", "blue")
    d.box(20, 308, 130, 40, "image encoder", "purple", dash=True)
    d.arrow((85, 76), (85, 105))
    d.arrow((85, 276), (85, 305))
    d.box(186, 108, 110, 240, "latents\n4x8x8 pixels\nof a clip,\n8x8 of\nan image", "green")
    d.arrow((150, 128), (183, 128))
    d.arrow((150, 328), (183, 328))
    d.box(330, 108, 130, 40, "video decoder", "blue")
    d.box(330, 308, 130, 40, "image decoder", "purple", dash=True)
    d.arrow((296, 128), (327, 128))
    d.arrow((296, 328), (327, 328))
    d.arrow((296, 150), (312, 150), (312, 308), (327, 318), color="strong")
    d.arrow((296, 306), (318, 306), (318, 156), (327, 142), color="warm", dash=True)
    d.box(330, 20, 130, 56, "clip\n4n + 1 frames", "gray")
    d.arrow((395, 108), (395, 79))
    d.box(330, 220, 130, 56, "frames\nn + 1 of them", "gray")
    d.arrow((395, 308), (395, 279))
    d.arrow((20, 380), (60, 380), color="strong")
    d.text(70, 385, "shared by shared.decoder_weight", size=13)
    d.arrow((20, 404), (60, 404), color="warm", dash=True)
    d.text(70, 409, "shared by shared.encoder_weight", size=13)
    d.text(20, 436, "dashed boxes: frozen", size=13, color="faint")


def ivideogpt_tokens(d: Drawing) -> None:
    """iVideoGPT: 256 tokens per context frame, then per predicted frame a slot with the action and 16 tokens."""
    d.text(20, 22, "context: 2 frames of 16 x 16 tokens", size=14, strong=True)
    for frame in range(2):
        left = 20 + 232 * frame
        for row in range(8):
            for column in range(8):
                d.box(left + 14 * column, 34 + 14 * row, 14, 14, fill="blue", radius=0)
        d.text(left + 124, 70, f"frame {frame}", size=14)
        d.text(left + 124, 92, "256 ids", size=13, color="faint")
    d.text(20, 184, "future: a slot, then 4 x 4 tokens per frame", size=14, strong=True)
    for frame in range(2):
        left = 20 + 232 * frame
        d.box(left, 206, 34, 34, "S2", "orange", size=13)
        for row in range(4):
            for column in range(4):
                d.box(left + 48 + 17 * column, 198 + 17 * row, 17, 17, fill="green", radius=0)
        d.text(left + 124, 218, f"frame {frame + 2}", size=14)
        d.text(left + 124, 240, "16 ids", size=13, color="faint")
        d.arrow((left + 17, 292), (left + 17, 243), color="warm")
        d.text(left, 310, f"action {frame + 1}, added", size=13, color="faint")
        d.arrow((left + 108, 258), (left + 108, 292), color="strong")
        d.text(left + 116, 288, f"reward {frame + 2}", size=13, color="faint")
    d.text(20, 344, "in one sequence", size=14, strong=True)
    parts = [("256", "blue", 84), ("S1", "gray", 30), ("256", "blue", 84)]
    for _ in range(4):
        parts += [("S2", "orange", 30), ("16", "green", 28)]
    left = 20
    for name, fill, width in parts:
        d.box(left, 354, width, 30, name, fill, size=13, radius=0)
        left += width
    d.text(20, 406, "logits are computed from the first S2 on:", size=13, color="faint")
    d.text(20, 426, "the context is never a target", size=13, color="faint")


DRAWINGS: dict[str, tuple[Callable[[Drawing], None], int]] = {
    "path": (path, 390),
    "batch": (batch, 464),
    "plan": (plan, 382),
    "sharding": (sharding, 528),
    "repvideo_gates": (repvideo_gates, 490),
    "enhance": (enhance, 310),
    "cv_vae": (cv_vae, 446),
    "ivideogpt_tokens": (ivideogpt_tokens, 436),
}


def files() -> dict[str, str]:
    """Every drawing's files by name: NAME.svg for light pages, NAME_dark.svg for dark ones."""
    made = {}
    for name, (draw, height) in DRAWINGS.items():
        for dark in (False, True):
            drawing = Drawing(height, " ".join((draw.__doc__ or "").split()), dark)
            draw(drawing)
            made[f"{name}{'_dark' * dark}.svg"] = drawing.svg()
    return made
