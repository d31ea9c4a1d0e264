"""OSEDiff: Stable Diffusion itself, fine-tuned by LoRA to restore in one step from the LR latent.

Wu et al., "One-Step Effective Diffusion Network for Real-World Image Super-Resolution", NeurIPS 2024; numbers of the
published code. LoRA: Hu et al., ICLR 2022, as peft has it.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from infra.errors import ModelError
from training.models.ccsr import CcsrModel, dtype_of
from training.models.library import AutoencoderKL, ConfigMixin, ModelMixin, UNet2DConditionModel, register_to_config

Targets = dict[str, list[str]]
"""LoRA's name -> the layers that it changes."""
NETWORKS: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
RANK = 4
ALPHA = 8  # peft's default, which the published code keeps: what B A computes is multiplied by ALPHA / rank
_UNET = ("to_k", "to_q", "to_v", "to_out.0", "conv", "proj_in", "proj_out", "ff.net.2", "ff.net.0.proj")
_VAE = ("conv", "to_k", "to_q", "to_v", "to_out.0")
# Of the script that trained the published OSEDiff (train_osediff.sh), for `vsd.negative_prompt`.
ONESTEP_NEGATIVE_PROMPT = (
    "painting, oil painting, illustration, drawing, art, sketch, cartoon, CG Style, 3D render, unreal engine, "
    "blurring, dirty, messy, worst quality, low quality, frames, watermark, signature, jpeg artifacts, deformed, "
    "lowres, over-smooth"
)
_PLACES = {"down_blocks": "encoder", "conv_in": "encoder", "up_blocks": "decoder", "conv_out": "decoder"}


def unet_targets(unet: UNet2DConditionModel) -> Targets:
    """The published choice: attention, feed-forward and convolutions, as three LoRAs by place."""
    targets: Targets = {f"default_{place}": [] for place in ("encoder", "decoder", "others")}
    for name in _layers(unet, _UNET):
        targets[f"default_{_PLACES.get(name.split('.')[0], 'others')}"].append(name)
    return targets


def vae_targets(vae: AutoencoderKL) -> Targets:
    """The published choice: convolutions and attention of the encoder, and the convolution after it."""
    return {"default_encoder": [name for name in _layers(vae, _VAE) if name.startswith(("encoder.", "quant_conv"))]}


def _layers(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    names = (name.removesuffix(".weight") for name, _ in network.named_parameters() if name.endswith(".weight"))
    return [name for name in names if "norm" not in name and any(pattern in name for pattern in patterns)]


class OneStepAdapter(ModelMixin, ConfigMixin):
    """The matrices of LoRAs by peft's names, `unet.PLACE.lora_A.NAME.weight`, and with `conv_in` a copy of the UNet's
    first convolution, which is trained in full: `unet.conv_in.base_layer`.

    `base`: the diffusers configs of "unet" and "vae"; `targets`: the LoRAs of each.
    """

    @register_to_config
    def __init__(
        self,
        base: Mapping[str, Mapping[str, Any]],
        targets: Mapping[str, Targets],
        ranks: Mapping[str, int],
        alpha: int = ALPHA,
        conv_in: bool = True,
    ) -> None:
        super().__init__()
        for part in targets:
            for name, layer in self._wrapped(part).named_modules():
                first = part == "unet" and conv_in and name == "conv_in.base_layer"
                if first or (".lora_" in name and isinstance(layer, nn.Linear | nn.Conv2d)):
                    _place(self, f"{part}.{name}", layer)
        for name, layer in self.named_modules():
            for leaf, weight in list(layer.named_parameters(recurse=False)):
                real = torch.empty(weight.shape)  # peft's "gaussian" initialisation
                nn.init.normal_(real, std=1 / ranks[name.split(".")[0]]) if ".lora_A." in name else nn.init.zeros_(real)
                layer.register_parameter(leaf, nn.Parameter(real))

    @classmethod
    def for_networks(cls, networks: Mapping[str, Any], conv_in: bool = True, **how: Any) -> Self:
        """With the published LoRAs, which change nothing yet, for "unet" and perhaps "vae"; drawn from torch's
        generator. `how`: other `targets` or `ranks`."""
        choose: dict[str, Any] = {"unet": unet_targets, "vae": vae_targets}
        base = {part: {k: v for k, v in net.config.items() if k[0] != "_"} for part, net in networks.items()}
        targets = {part: choose[part](network) for part, network in networks.items()}
        adapter = cls(base, **{"targets": targets, "ranks": dict.fromkeys(networks, RANK), **how}, conv_in=conv_in)
        if conv_in:
            first = adapter.get_submodule("unet.conv_in.base_layer")
            for own, weight in zip(first.parameters(), networks["unet"].conv_in.parameters(), strict=True):
                own.data.copy_(weight.data)
        return adapter

    def around(self, network: Any, part: str) -> Any:
        """A network that computes with the weights of `network`, which stays as it is, under these LoRAs.

        All weights are shared: it costs no memory, and learns and moves with both.
        """
        found = self._wrapped(part)
        for name, layer in network.named_modules():
            if any(True for _ in layer.parameters(recurse=False)):
                wrapped = hasattr(found.get_submodule(name), "base_layer")
                found.set_submodule(f"{name}.base_layer" if wrapped else name, layer)
        for name, layer in self.get_submodule(part).named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                found.set_submodule(name, layer)
        return found.train(network.training)

    def _wrapped(self, part: str) -> Any:
        """The network of the base's config under LoRAs, without memory."""
        from peft import LoraConfig  # a second, with transformers, that the other families need not wait
        from peft.functional import inject_adapter_in_model, set_adapter

        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several LoRAs are meant
            network = NETWORKS[part].from_config(dict(self.config.base[part]))
            for name, layers in self.config.targets[part].items():
                lora = LoraConfig(r=self.config.ranks[part], lora_alpha=self.config.alpha, target_modules=list(layers))
                inject_adapter_in_model(lora, network, name)
        set_adapter(network, list(self.config.targets[part]))
        return network


def _place(root: nn.Module, path: str, layer: nn.Module) -> None:
    *parents, last = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]
    root.add_module(last, layer)


@dataclass
class OneStepModel(CcsrModel):
    """The adapter is a `OneStepAdapter` on UNet and VAE encoder; None: merged with them, which can only restore.

    `unet` and `vae` stay the base's: `generator` is the UNet that restores.
    """

    generator: Any = field(init=False, repr=False)
    cached_prompts: ClassVar[tuple[str, ...]] = ("", ONESTEP_NEGATIVE_PROMPT)

    @staticmethod
    def fresh_adapter(unet: UNet2DConditionModel, vae: AutoencoderKL, preset: str) -> nn.Module:
        return OneStepAdapter.for_networks({"unet": unet, "vae": vae})

    @property
    def adapter_parts(self) -> dict[str, nn.Module]:
        parts = {"LoRA of the UNet, and its first convolution": "unet", "LoRA of the VAE encoder": "vae"}
        return {name: self.adapter.get_submodule(part) for name, part in parts.items()}

    def __post_init__(self) -> None:
        parts = {} if self.adapter is None else self.adapter.config.targets
        self.generator = self.adapter.around(self.unet, "unet") if "unet" in parts else self.unet
        self.condition_encoder = self.adapter.around(self.vae, "vae") if "vae" in parts else None

    @property
    def networks(self) -> dict[str, nn.Module]:
        networks = {"vae": self.vae, "unet": self.unet, "lora": self.adapter}
        return {name: network for name, network in networks.items() if network is not None}

    @property
    def computing(self) -> list[Any]:
        return [self.generator, self.condition_encoder, self.vae]

    def trained_part(self, stage: int) -> nn.Module:
        if self.adapter is None:
            raise ModelError(
                "this model's LoRAs are merged, so nothing is left to train",
                where="init_from",
                todo="give the model that was exported, or ccsr convert OUT --family onestep",
            )
        return self.adapter

    def with_adapter(self, adapter: OneStepAdapter | None) -> "OneStepModel":
        """A model of the same base under another adapter; None: the base itself."""
        return OneStepModel(self.config, self.vae, self.unet, adapter, self.prompts)

    def merged(self) -> "OneStepModel":
        """A model without adapter that computes the same, rounding aside; it shares what no LoRA changes."""
        parts = {"unet": self.generator, "vae": self.condition_encoder}
        networks = {part: _merged(network, getattr(self, part)) for part, network in parts.items()}
        return OneStepModel(self.config, **networks, adapter=None, prompts=self.prompts)

    def _predict(self, x_t: Tensor, t: Tensor, text: Tensor, condition: Tensor) -> Tensor:
        dtype = dtype_of(self.unet)
        return self.generator(x_t.to(dtype), t, text.to(dtype), return_dict=False)[0]


def full_weight(layer: Any) -> Tensor:
    """A layer's weight, with its LoRA's part if there is one."""
    if not hasattr(layer, "base_layer"):
        return layer.weight
    return layer.base_layer.weight + sum(
        layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A
    )


@torch.no_grad()
def _merged(network: Any, base: Any) -> Any:
    with torch.device("meta"):
        found = type(base).from_config(base.config)
    state = {}
    for name, layer in found.named_modules():
        source = network.get_submodule(name)
        for leaf, _ in layer.named_parameters(recurse=False):
            state[f"{name}.{leaf}"] = full_weight(source) if leaf == "weight" else getattr(source, leaf)
    found.load_state_dict(state, assign=True)
    return found.train(network.training)
