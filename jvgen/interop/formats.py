"""Which networks have a layout in PyTorch's world: the class that reads them, and where our side of it lies.

A new network with a `torch_map.py` is made exportable by one row of `FORMATS`.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from jvgen.config import Config
from jvgen.models.weight_map import WeightMap
from jvgen.nn.network import Network


@dataclasses.dataclass(frozen=True)
class Format:
    """One folder layout: `config.json` and the weights of one network.

    Attributes:
      class_name: class of theirs that reads the folder.
      library: whose class it is; "paper" for the authors' own code, "jvgen" for networks that exist here only.
      room: package of ours with `config`, `model` and `torch_map`.
      config_name, model_name: classes in that package.
      read_as: other class names whose files hold this network among other tensors.
    """

    class_name: str
    library: Literal["diffusers", "transformers", "paper", "jvgen"]
    room: str
    config_name: str
    model_name: str
    read_as: tuple[str, ...] = ()

    @property
    def weights_name(self) -> str:
        """Stem of the weights file, as the library has it."""
        return "diffusion_pytorch_model" if self.library in ("diffusers", "paper") else "model"

    @property
    def config_class(self) -> type[Config]:
        """Our configuration class."""
        return getattr(self._module("config"), self.config_name)

    def network(self, config: Config) -> Network:
        """The structure of the network."""
        model: Callable[..., Any] = getattr(self._module("model"), self.model_name)
        return Network.of(lambda rngs: model(config, rngs=rngs))

    def weight_map(self, config: Config, names: Iterable[str] = ()) -> WeightMap:
        """The table of names and layouts; of a network with several of them the one whose tensors have these names."""
        module = self._module("torch_map")
        choose = getattr(module, "weight_map_of_names", None)
        return module.weight_map(config) if choose is None else choose(config, names)

    def to_json(self, config: Config) -> dict[str, Any]:
        """What `config.json` holds."""
        return self._module("torch_map").to_diffusers_config(config)

    def from_json(self, values: Mapping[str, Any]) -> Config:
        """Our configuration from what `config.json` holds."""
        return self._module("torch_map").from_diffusers_config(dict(values))

    def told_by_tensors(self, values: Mapping[str, Any], open_weights: Callable[[], Any]) -> dict[str, Any]:
        """What files of this kind leave out of `config.json`, because their tensors tell it; reads names and shapes."""
        tell = getattr(self._module("torch_map"), "told_by_tensors", None)
        return {} if tell is None else tell(dict(values), open_weights)

    def adapted(self, parameters: Mapping[str, Any], found: Config, wanted: Config) -> dict[str, Any]:
        """Parameters of `found` that a network `wanted` of the same kind can begin with; what is left out is new there.

        Raises:
          ValueError: the two differ in what cannot be made up for.
        """
        adapt = getattr(self._module("torch_map"), "adapted", None)
        if adapt is None:
            raise ValueError(
                f"{self.class_name}: its weights fit networks of the same shape only; leave --allow-partial out."
            )
        return adapt(dict(parameters), found, wanted)

    @property
    def companion(self) -> str | None:
        """Stem of the files beside the weights with what the class has no place for; see `jvgen.interop.companion`."""
        return getattr(self._module("torch_map"), "COMPANION", None)

    def companion_map(self, config: Config) -> WeightMap | None:
        """The table of the parameters that the class has no place for; None if there are none."""
        return None if self.companion is None else self._module("torch_map").companion_map(config)

    def companion_json(self, config: Config) -> dict[str, Any]:
        """What is said of them beside their tensors."""
        return self._module("torch_map").companion_json(config)

    def with_companion(self, config: Config, values: Mapping[str, Any]) -> Config:
        """A configuration with what `companion_json` says."""
        return self._module("torch_map").with_companion(config, dict(values))

    def _module(self, name: str) -> Any:
        return importlib.import_module(f"{self.room}.{name}")


FORMATS = (
    Format("AutoencoderKL", "diffusers", "jvgen.models.image_vae", "ImageVAEConfig", "ImageVAE"),
    Format("AutoencoderKLCogVideoX", "diffusers", "jvgen.models.cogvideox_vae", "CogVideoXVAEConfig", "CogVideoXVAE"),
    Format("CogVideoXTransformer3DModel", "diffusers", "jvgen.models.video_dit", "VideoDiTConfig", "VideoDiT"),
    Format(
        "T5EncoderModel",
        "transformers",
        "jvgen.models.t5",
        "T5Config",
        "T5Encoder",
        read_as=("T5ForConditionalGeneration", "T5Model"),
    ),
    Format(
        "CompressiveVQModel",
        "paper",
        "jvgen.models.ivideogpt",
        "CompressiveTokenizerConfig",
        "CompressiveTokenizer",
    ),
    Format("LlamaForCausalLM", "transformers", "jvgen.models.ivideogpt", "FrameTransformerConfig", "FrameTransformer"),
    Format("ViewParts", "jvgen", "jvgen.models.multiview", "MultiViewDiTConfig", "MultiViewModules"),
    Format("CVVAEModel", "paper", "jvgen.models.cv_vae", "CVVAEConfig", "CVVAE"),
    Format("CVVAESD3Model", "paper", "jvgen.models.cv_vae", "CVVAEConfig", "CVVAE"),
    Format("CVVAE", "jvgen", "jvgen.models.cv_vae", "CVVAEConfig", "CVVAE"),
    Format("ByteTextEncoder", "jvgen", "jvgen.models.byte_text", "ByteTextConfig", "ByteTextEncoder"),
)


def format_of(config: Config) -> Format:
    """The layout of the network that a configuration describes.

    Raises:
      ValueError: no layout is known for it.
    """
    name = type(config).__name__
    for candidate in FORMATS:
        # Compared by name first, so that only the package in question is imported. A configuration whose networks are
        # read by several classes says by which.
        said = getattr(config, "class_name", candidate.class_name)
        if (candidate.config_name, candidate.class_name) == (name, said) and isinstance(config, candidate.config_class):
            return candidate
    known = ", ".join(dict.fromkeys(candidate.config_name for candidate in FORMATS))
    raise ValueError(f"{name}: no PyTorch layout is known for this network; there is one for {known}.")


def format_named(values: Mapping[str, Any], where: str) -> Format:
    """The layout that a `config.json` announces by `_class_name` (diffusers) or `architectures` (transformers).

    Args:
      values: the parsed file.
      where: its path, for the message.

    Raises:
      ValueError: it names no class, or one that is not known.
    """
    architectures = values.get("architectures") or [None]
    name = values.get("_class_name") or architectures[0]
    for candidate in FORMATS:
        if name == candidate.class_name or name in candidate.read_as:
            return candidate
    known = ", ".join(candidate.class_name for candidate in FORMATS)
    said = "names no class" if name is None else f"names the class {name}, which has no counterpart here"
    raise ValueError(f"{where} {said}. Known: {known}.")
