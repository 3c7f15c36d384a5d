"""Rolling out a world model: ours in one program, against transformers' generate as the released code drives it."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jvgen.models.ivideogpt.config import FrameTransformerConfig
from jvgen.models.ivideogpt.decoding import Decoder
from jvgen.models.ivideogpt.layout import Layout
from jvgen.models.ivideogpt.sampling import SamplingConfig
from jvgen.models.ivideogpt.transformer import FrameTransformer
from jvgen.models.ivideogpt.transformer_map import WRAPPED, transformer_map, transformer_to_json
from jvgen.nn.network import Network
from tests.benchmarks import timing
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result


@dataclasses.dataclass(frozen=True)
class Size:
    """A transformer, and clips of 64x64 as the released tokenizer codes them: 256 and 16 tokens a frame."""

    width: int
    layers: int
    heads: int
    batch: int
    future: int
    context: int = 2
    tokens: tuple[int, int] = (256, 16)
    codes: int = 8192
    dtype: str = "float32"

    def config(self) -> FrameTransformerConfig:
        return FrameTransformerConfig(
            vocabulary=2 * self.codes + 2, width=self.width, layers=self.layers, heads=self.heads,
            hidden=4 * self.width, action_width=4,
        )  # fmt: skip

    def layout(self) -> Layout:
        return Layout(
            context_frames=self.context, future_frames=self.future, context_tokens=self.tokens[0],
            future_tokens=self.tokens[1], context_codes=self.codes, future_codes=self.codes,
        )  # fmt: skip


QUICK = {"tiny": Size(32, 1, 2, batch=2, future=2, tokens=(9, 4), codes=20)}
CPU = {
    # The released small model, one imagined episode; and a quarter of it, eight of them.
    "small": Size(768, 12, 12, batch=1, future=4),
    "quarter": Size(384, 6, 6, batch=8, future=4),
}
GPU = {
    "small": Size(768, 12, 12, batch=1, future=10, dtype="bfloat16"),
    "small_64": Size(768, 12, 12, batch=64, future=10, dtype="bfloat16"),
    "medium_64": Size(1024, 24, 16, batch=64, future=10, dtype="bfloat16"),
}
SHOWN = (
    "case", "ours_frames_s", "released_frames_s", "generate_frames_s", "cached_frames_s", "speed_over_released",
    "speed_over_generate", "speed_over_cached", "middle_half_released", "middle_half_cached", "equal_ids",
    "ours_compile_s",
)  # fmt: skip


class Theirs:
    """The Llama of transformers with the wrapper's map from actions, greedy, driven in the two ways compared."""

    def __init__(self, size: Size, weights: dict[str, np.ndarray], device: str):
        config, self.layout, self.device = size.config(), size.layout(), device
        values = transformer_to_json(config) | {"use_cache": True}
        self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
        inside = {n.removeprefix(WRAPPED): torch.from_numpy(a.copy()) for n, a in weights.items() if WRAPPED in n}
        self.model.load_state_dict(inside, strict=True)
        self.model.to(device=device, dtype=getattr(torch, size.dtype)).eval()
        self.model.generation_config.pad_token_id = 0
        kernel, bias = (torch.from_numpy(weights[f"action_linear.{name}"].copy()) for name in ("weight", "bias"))
        self.kernel, self.bias = (tensor.to(device=device, dtype=self.model.dtype) for tensor in (kernel, bias))

    def _slot(self, actions: torch.Tensor, frame: int) -> torch.Tensor:
        """Embeddings of the slot that opens a frame, with its action."""
        slots = torch.full((len(actions), 1), self.layout.future_slot, device=self.device)
        return self.model.model.embed_tokens(slots) + (actions[:, frame] @ self.kernel.T + self.bias)[:, None]

    @torch.no_grad()
    def released(self, prompt: torch.Tensor, actions: torch.Tensor) -> np.ndarray:
        """Each frame from a `generate` over embeddings of everything before it."""
        embedded, made = self.model.model.embed_tokens(prompt), []
        for frame in range(self.layout.future_frames):
            embedded = torch.cat([embedded, self._slot(actions, frame)], dim=1)
            ids = self.model.generate(
                inputs_embeds=embedded, attention_mask=torch.ones(embedded.shape[:2], device=self.device),
                max_new_tokens=self.layout.future_tokens, do_sample=False,
            )  # fmt: skip
            made.append(ids)
            embedded = torch.cat([embedded, self.model.model.embed_tokens(ids)], dim=1)
        return torch.stack(made, dim=1).cpu().numpy()

    @torch.no_grad()
    def generate(self, prompt: torch.Tensor, actions: torch.Tensor) -> np.ndarray:
        """As `released`, but with the keys and values of what came before given to `generate`."""
        embedded, made, cache = self.model.model.embed_tokens(prompt), [], transformers.DynamicCache()
        for frame in range(self.layout.future_frames):
            embedded = torch.cat([embedded, self._slot(actions, frame)], dim=1)
            ids = self.model.generate(
                inputs_embeds=embedded, attention_mask=torch.ones(embedded.shape[:2], device=self.device),
                max_new_tokens=self.layout.future_tokens, do_sample=False, past_key_values=cache,
            )  # fmt: skip
            made.append(ids)
            embedded = torch.cat([embedded, self.model.model.embed_tokens(ids)], dim=1)
        return torch.stack(made, dim=1).cpu().numpy()

    @torch.no_grad()
    def cached(self, prompt: torch.Tensor, actions: torch.Tensor) -> np.ndarray:
        """Keys and values kept over the whole rollout: the prompt once, then one token a call."""
        cache = transformers.DynamicCache()
        self.model(inputs_embeds=self.model.model.embed_tokens(prompt), past_key_values=cache, logits_to_keep=1)
        made = []
        for frame in range(self.layout.future_frames):
            x, ids = self._slot(actions, frame), []
            for _ in range(self.layout.future_tokens):
                logits = self.model(inputs_embeds=x, past_key_values=cache).logits[:, -1]
                ids.append(logits.argmax(-1, keepdim=True))
                x = self.model.model.embed_tokens(ids[-1])
            self.model(inputs_embeds=x, past_key_values=cache)
            made.append(torch.cat(ids, dim=1))
        return torch.stack(made, dim=1).cpu().numpy()


def parameters_of(config: FrameTransformerConfig) -> tuple[Network, dict]:
    """Random parameters with scores far enough apart that rounding does not choose."""
    network = Network.of(lambda rngs: FrameTransformer(config, rngs=rngs))
    rng = np.random.default_rng(0)

    def draw(path, leaf) -> np.ndarray:
        if leaf.ndim == 1 or "norm" in jax.tree_util.keystr(path):
            return np.ones(leaf.shape, np.float32)
        scale = 1.0 if "table" in jax.tree_util.keystr(path) else leaf.shape[-2] ** -0.5
        return scale * rng.standard_normal(leaf.shape, np.float32)

    return network, jax.tree_util.tree_map_with_path(draw, network.shapes)


def compare(name: str, size: Size, settings: Settings) -> tuple[dict, dict]:
    """One row of the table, and all samples."""
    config, layout = size.config(), size.layout()
    _, parameters = parameters_of(config)
    rng = np.random.default_rng(1)
    context = rng.integers(0, size.codes, (size.batch, size.context, size.tokens[0])).astype(np.int32)
    prompt = np.asarray(layout.prompt(jnp.asarray(context)))
    actions = rng.standard_normal((size.batch, size.future, 4)).astype(np.float32)

    decoder = Decoder(config, layout, SamplingConfig(greedy=True), dtype=jnp.dtype(size.dtype))
    weights = jax.jit(decoder.prepare)(parameters)
    keys = jax.random.split(jax.random.key(0), size.batch)
    began = time.perf_counter()
    program = jax.jit(decoder.rollout).lower(weights, prompt, actions, keys).compile()
    compiled = time.perf_counter() - began

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if device == "cpu":
        torch.set_num_threads(settings.cores)
    theirs = Theirs(size, dict(transformer_map(config).to_torch(parameters)), device)
    given = torch.from_numpy(prompt.copy()).long().to(device), torch.from_numpy(actions).to(device, theirs.model.dtype)
    results: dict[str, np.ndarray] = {}

    def run(side: str, function) -> None:
        results[side] = np.asarray(function())

    sides = {
        "ours": lambda: run("ours", lambda: program(weights, prompt, actions, keys)[0]),
        "released": lambda: run("released", lambda: theirs.released(*given)),
        "generate": lambda: run("generate", lambda: theirs.generate(*given)),
        "cached": lambda: run("cached", lambda: theirs.cached(*given)),
    }
    for warm in sides.values():
        warm()
    samples = timing.in_turns(sides, settings.repeats)
    frames = size.batch * size.future
    row: dict[str, object] = {"case": name, "ours_compile_s": compiled}
    row["equal_ids"] = float(np.mean(results["ours"] == results["released"]))
    for side in ("generate", "cached"):
        row[f"equal_ids_{side}"] = float(np.mean(results["ours"] == results[side]))
    for side, sample in samples.items():
        row[f"{side}_frames_s"] = frames / sample.median
    for side in ("released", "generate", "cached"):
        ratio = timing.ratio(samples["ours"], samples[side])
        row[f"speed_over_{side}"] = 1 / ratio["ratio_of_medians"]
        row[f"middle_half_{side}"] = f"{1 / ratio['quartile_high']:.2f}-{1 / ratio['quartile_low']:.2f}"
        row[f"processor_time_over_{side}"] = ratio["ratio_of_processor_time"]
    return row, {side: dataclasses.asdict(sample) for side, sample in samples.items()}


def run(settings: Settings) -> Result:
    """All cases of this backend."""
    sizes = QUICK if settings.quick else GPU if jax.default_backend() == "gpu" else CPU
    settings = dataclasses.replace(settings, repeats=min(settings.repeats, 3))
    rows, samples = [], {}
    for name, size in sizes.items():
        row, samples[name] = compare(name, size, settings)
        rows.append(row)
    return Result(
        title="action-conditioned rollout, greedy; speed_over_X = X's time over ours, above 1 we are faster",
        settings={name: dataclasses.asdict(size) for name, size in sizes.items()},
        rows=rows,
        shown=SHOWN,
        samples=samples,
        notes=(
            "same weights (through the weight map), same prompts and actions. released: transformers' generate once a",
            "frame over the embeddings of everything before it, with its own cache, as the released code does.",
            "generate: the same, given the keys and values of what came before. cached: these kept by a loop without",
            "generate, one call a token. equal_ids: share of ids that ours and the released way agree on. Tokenizer",
            "and pixels are not part of it.",
        ),
    )
