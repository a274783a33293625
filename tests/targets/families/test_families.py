import pytest
import torch

from pared.errors import ConfigError
from pared.targets.families.family import Family
from pared.targets.families.fold import Fold
from pared.targets.families.folding import folds_of
from pared.targets.families.table import FAMILIES, family_of
from tests.targets.families.models import built


def test_each_architecture_has_one_family() -> None:
    names = [name for family in FAMILIES for name in family.architectures]
    assert len(names) == len(set(names))
    assert all(family_of({"architectures": [name]}) in FAMILIES for name in names)


@pytest.mark.parametrize("config", [{}, {"architectures": None}, {"architectures": ["MPNetModel"]}])
def test_others_are_refused_with_the_list(config: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"is not known\n  Known are LlamaForCausalLM, MistralForCausalLM, .*BertMo"):
        family_of(config)


def test_only_whole_folds_are_found() -> None:
    family = family_of({"architectures": ["GPT2LMHeadModel"]})
    block = "transformer.h.10."
    names = [f"{block}ln_1.weight", f"{block}ln_1.bias", f"{block}attn.c_attn.weight", f"{block}ln_2.weight"]
    assert folds_of(family, {}, names) == [Fold(tuple(names[:2]), (names[2],))]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_fold_changes_nothing(family: Family) -> None:
    model = built(family.name)
    tensors = dict(model.named_parameters())
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        before = model(ids)[0]
        folds = folds_of(family, model.config.to_dict(), tensors)
        assert len(folds) == 2 * len(family.links)
        for fold in folds:
            weight = tensors[fold.source[0]]
            torch.manual_seed(len(weight))
            factors = torch.rand(len(weight)) + 0.5
            for name in fold.source:
                offset = fold.offset if name.endswith(".weight") else 0
                tensor = tensors[name]
                tensor.copy_((tensor + offset) / factors.reshape([-1] + [1] * (tensor.ndim - 1)) - offset)
            for name in fold.products:
                transposed = name.split(".")[-2] in family.transposed
                matrix = tensors[name].T if transposed else tensors[name]
                matrix.mul_(factors[fold.rows(matrix.shape[1])])
        torch.testing.assert_close(model(ids)[0], before, rtol=1e-4, atol=1e-4)
