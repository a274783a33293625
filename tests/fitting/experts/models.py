"""Small mixtures of experts of transformers, whose routers never take some of the experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn

EXPERTS: Final = 6
NEVER: Final = 4  # the expert that no token of calibration reaches
TOKENS: Final = 300
_SMALL: Final = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": TOKENS,
    "num_experts_per_tok": 2,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "Mixtral": ("MixtralConfig", {"num_local_experts": EXPERTS}),
    "Qwen2-MoE": (
        "Qwen2MoeConfig",
        {"num_experts": EXPERTS, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 24},
    ),
    "Qwen3-MoE": ("Qwen3MoeConfig", {"num_experts": EXPERTS, "moe_intermediate_size": 40, "head_dim": 8}),
    "OLMoE": ("OlmoeConfig", {"num_experts": EXPERTS}),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": EXPERTS, "head_dim": 8}),
}


def mixture(family: str) -> Any:
    """A random model with its usual start; the router's numbers are large, so that it chooses clearly."""
    name, options = CONFIGS[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**_SMALL, **options})
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        router(model).weight.mul_(3.0)
        model.model.layers[0].self_attn.o_proj.weight.mul_(0.02)  # the token decides its experts, nearly alone
    return model


def router(model: Any) -> Any:
    """What chooses among the experts of the only layer."""
    layer = model.model.layers[0].mlp
    return layer.gate if hasattr(layer, "gate") else layer.router


def scores(model: Any, ids: Tensor) -> Tensor:
    """The router's logits, (tokens, experts)."""
    logits: list[Tensor] = []
    hook = router(model).register_forward_hook(lambda _, __, output: logits.append(output[0]))
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    return logits[0].reshape(-1, EXPERTS)


def texts(model: Any, *, reached: bool) -> list[dict[str, Tensor]]:
    """Windows of 40 tokens of which none is for one of the experts, or all are: a token decides that alone."""
    found = scores(model, torch.arange(TOKENS)[:, None])
    second = found.topk(2, -1).values[:, 1]
    sure = found[:, NEVER] >= second if reached else found[:, NEVER] < second - 1.0
    words = sure.nonzero().flatten()
    generator = torch.Generator().manual_seed(int(reached))
    drawn = words[torch.randint(len(words), (8, 40), generator=generator)]
    return [{"input_ids": ids[None]} for ids in drawn]


class Listed(nn.Module):
    """A mixture of modules, as older models have them, in a small language model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(TOKENS, 32)
        self.gate = nn.Linear(32, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 32)) for _ in range(EXPERTS)
        )
        self.head = nn.Linear(32, TOKENS, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids).flatten(0, 1)
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        out = x.clone()
        for e, expert in enumerate(self.experts):
            token, place = torch.where(chosen == e)
            if len(token):
                out = out.index_add(0, token, weights[token, place, None] * expert(x[token]))
        logits: Tensor = self.head(out).reshape(*input_ids.shape, -1)
        return logits


def output(model: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
    """The logits."""
    with torch.no_grad():
        found = model(**batch)
    logits: Tensor = found if isinstance(found, Tensor) else found.logits
    return logits
