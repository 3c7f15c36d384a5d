"""The networks that have a PyTorch format: the class that reads them, and the package of ours that has them.

To make a new network with a `torch_map.py` exportable, add a row to `FORMATS`.
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
    """One folder format: `config.json` and the weights of one network.

    The module `torch_map` of the package has `weight_map`, `to_diffusers_config` and `from_diffusers_config`, and may
    have the other functions that the methods below look up.

    Attributes:
      class_name: PyTorch class that reads the folder.
      library: where that class is; "paper" for the authors' code, "jvgen" for networks that exist here only.
      package: package of ours with the modules `config`, `model` and `torch_map`.
      config_name, model_name: classes in that package.
      read_as: other class names whose files hold this network among other tensors.
    """

    class_name: str
    library: Literal["diffusers", "transformers", "paper", "jvgen"]
    package: str
    config_name: str
    model_name: str
    read_as: tuple[str, ...] = ()

    @property
    def weights_name(self) -> str:
        """Stem of the weights file in the library."""
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
        """The table of names and layouts; for a network with several tables, the one with these tensor names."""
        module = self._module("torch_map")
        choose = getattr(module, "weight_map_for_names", None)
        return module.weight_map(config) if choose is None else choose(config, names)

    def to_json(self, config: Config) -> dict[str, Any]:
        """The content of `config.json`."""
        return self._module("torch_map").to_diffusers_config(config)

    def from_json(self, values: Mapping[str, Any]) -> Config:
        """Our configuration from the content of `config.json`."""
        return self._module("torch_map").from_diffusers_config(dict(values))

    def json_from_tensors(self, values: Mapping[str, Any], open_weights: Callable[[], Any]) -> dict[str, Any]:
        """Keys that `config.json` lacks and names and shapes of the tensors determine; reads no tensor."""
        read = getattr(self._module("torch_map"), "json_from_tensors", None)
        return {} if read is None else read(dict(values), open_weights)

    def adapt_parameters(self, parameters: Mapping[str, Any], found: Config, wanted: Config) -> dict[str, Any]:
        """Parameters of `found` to initialize a network `wanted` with; what it lacks is to be initialized randomly.

        Raises:
          ValueError: the two differ in sizes that cannot be adapted.
        """
        adapt = getattr(self._module("torch_map"), "adapt_parameters", None)
        if adapt is None:
            raise ValueError(
                f"{self.class_name}: its weights fit networks of the same shape only; leave --allow-partial out."
            )
        return adapt(dict(parameters), found, wanted)

    @property
    def extra_weights(self) -> str | None:
        """Stem of the files of parameters that the class does not have; see `jvgen.interop.extra_weights`."""
        return getattr(self._module("torch_map"), "EXTRA_WEIGHTS", None)

    def extra_weight_map(self, config: Config) -> WeightMap | None:
        """The table of the parameters that the class does not have; None if there are none."""
        return None if self.extra_weights is None else self._module("torch_map").extra_weight_map(config)

    def extra_weights_json(self, config: Config) -> dict[str, Any]:
        """The description of the extra weights."""
        return self._module("torch_map").extra_weights_json(config)

    def with_extra_weights(self, config: Config, values: Mapping[str, Any]) -> Config:
        """A configuration completed by the description of its extra weights."""
        return self._module("torch_map").with_extra_weights(config, dict(values))

    def _module(self, name: str) -> Any:
        return importlib.import_module(f"{self.package}.{name}")


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
    Format("Dinov2Model", "transformers", "jvgen.models.dinov2", "Dinov2Config", "Dinov2"),
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
    """The format of the network that a configuration describes.

    Raises:
      ValueError: there is none.
    """
    name = type(config).__name__
    for candidate in FORMATS:
        # By name first, so that only one package is imported. Configurations of several classes have a `class_name`.
        class_name = getattr(config, "class_name", candidate.class_name)
        if (candidate.config_name, candidate.class_name) == (name, class_name) and isinstance(
            config, candidate.config_class
        ):
            return candidate
    known = ", ".join(dict.fromkeys(candidate.config_name for candidate in FORMATS))
    raise ValueError(f"{name}: no PyTorch layout is known for this network; there is one for {known}.")


def format_named(values: Mapping[str, Any], where: str) -> Format:
    """The format that a `config.json` names as `_class_name` (diffusers) or `architectures` (transformers).

    Args:
      values: the parsed file.
      where: its path, for the message.

    Raises:
      ValueError: it names no class, or one without a format.
    """
    architectures = values.get("architectures")
    listed = architectures[0] if isinstance(architectures, list) and architectures else None
    name = values.get("_class_name") or listed
    for candidate in FORMATS:
        if name == candidate.class_name or name in candidate.read_as:
            return candidate
    known = ", ".join(candidate.class_name for candidate in FORMATS)
    problem = "names no class" if name is None else f"names the class {name}, which has no counterpart here"
    raise ValueError(f"{where} {problem}. Known: {known}.")
