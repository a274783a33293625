"""A quantized model as files: a directory of ours, or a folder that `from_pretrained` of transformers opens."""

from __future__ import annotations

import copy
import json
import logging
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from torch import nn

from pared.artifact.beside import companions
from pared.artifact.shards import split
from pared.checkpoints.pretrained.folder import NOTE, check_replaceable, described, write_config
from pared.errors import ConfigError, ModelError
from pared.files.directories.lock import SHORT_WAIT, owned
from pared.files.disk import as_path, make_directory, write_atomic
from pared.inspection import ledger
from pared.model import storage
from pared.model.contents import Contents
from pared.runtime import summary
from pared.runtime.profile.profile import ENGINE_FILE
from pared.runtime.record import contents_of, record_of
from pared.switches import rare_collections
from pared.terminal import parse_size

DEPLOY: Final = "deploy.yaml"
# What torch.save takes for the name and the place of each tensor, and for the archive around them (estimates).
_TORCH_ENTRY: Final = 300
_TORCH_ARCHIVE: Final = 1000

# What transformers offers for states of training and for old files, and what is always so here.
_WITHOUT_EFFECT: Final = ("safe_serialization", "save_peft_format", "save_original_format")
# The files that tokenizers and processors of transformers are saved as; what names of chat templates begin with.
TOKENIZER: Final = frozenset(
    ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
     "source.spm", "target.spm", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json",
     "special_tokens_map.json", "preprocessor_config.json", "processor_config.json")
)  # fmt: skip
_TEMPLATES: Final = ("chat_template.", "additional_chat_templates/")

log = logging.getLogger(__name__)


def save(model: nn.Module, directory: str | Path, *, container: str = "pt", verify: bool = True) -> Path:
    """Write a quantized model to a directory: the artifact, `deploy.yaml` for people, `engine.json` for this machine.

    Args:
        model: a model that `fit` or `load` returned.
        directory: where to write; it is created if it is missing, and files of an earlier save are replaced, each
            atomically.
        container: "pt" (`best_model.pt`) or "safetensors" (`best_model.safetensors`).
        verify: whether to read the artifact back and compare every number.

    Returns:
        the artifact's path.

    Raises:
        FileError: the directory cannot be written, or another run is writing there and does not end.
        ModelError: the model is not a quantized one, or its weights were changed after compression.
    """
    record = record_of(model)
    with rare_collections(len(record.tensors)):
        contents = contents_of(model)
        path = storage.place(directory, container)
        made = storage.verified(contents, container) if verify else storage.encoded(contents, container)
        listed = ledger.of_records(replace(made.records, where=path.name), made.index)
        deploy = summary.deploy_yaml(listed, contents, record.outcome_here, record.running, record.profile)
    with owned(path.parent, wait=SHORT_WAIT):  # the files belong together
        for name, content in ((path.name, made.file), (DEPLOY, deploy), (ENGINE_FILE, record.profile.to_json())):
            storage.write_beside(path, name, content)
    _warn_if_larger(path, len(made.file), model, contents)
    return path


def _warn_if_larger(path: Path, nbytes: int, model: nn.Module, contents: Contents) -> None:
    """Say so if a file is larger than the state dict of the float model: only buffers outside of it can cause that."""
    sizes = {one.name: math.prod(one.coded.shape) * one.coded.dtype.itemsize for one in contents.tensors}
    left_out = sizes.keys() & {
        f"{name}.{buffer}".removeprefix(".")
        for name, module in model.named_modules(remove_duplicate=False)
        for buffer in module._non_persistent_buffers_set
    }
    source = _TORCH_ARCHIVE + sum(nbytes + _TORCH_ENTRY for name, nbytes in sizes.items() if name not in left_out)
    kept = [one.name for one in contents.tensors if one.name in left_out and one.decision.treatment != "made"]
    if kept and nbytes > source:
        named = f"; {max(kept, key=sizes.__getitem__)} is the largest of {len(kept)}"
        what = "%s: %s bytes are more than the about %s that the float model's state dict takes, which leaves buffers "
        log.warning(f"{what}out%s", path, f"{nbytes:,}", f"{source:,}", named)


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: object = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "50GB",
    **options: Any,
) -> None:
    """Write a folder that `from_pretrained` opens once pared is imported; quantized models of transformers offer it.

    The folder holds what `save` writes, the configuration and that of generation, and the model's own code where it was
    loaded from a folder with code. Tokenizers are models of their own, which transformers saves apart; where the model
    came from a local folder with a tokenizer, that is copied unless there is one already.

    Args:
        model: a model that `fit` or `load` returned, of a class of transformers.
        save_directory: where to write; it is created if it is missing.
        is_main_process: False writes nothing.
        state_dict: only None: the numbers are those of the model.
        push_to_hub: whether to call `push_to_hub` afterwards.
        max_shard_size: the size of a file, in bytes or as "5GB", above which the artifact is divided.
        options: those of `push_to_hub`: repo_id (default: the directory's name), commit_message, token, ...

    Raises:
        ConfigError: an option has no meaning for a quantized model; or the directory holds another model, such as the
            float one, which its new config.json would make unreadable.
        FileError: the directory cannot be written.
        ModelError: the weights were changed after compression.
    """
    for name in ("variant", "state_dict"):
        if (state_dict if name == "state_dict" else options.pop(name, None)) is not None:
            raise ConfigError(
                f"{name} cannot be chosen for a quantized model, whose artifact is whole",
                where="save_pretrained",
                remedy=f"Leave {name} out.",
            )
    for name in _WITHOUT_EFFECT:
        options.pop(name, None)
    if is_main_process:
        output = as_path(save_directory, "save_pretrained")
        _write_pretrained(model, output, parse_size(max_shard_size))
        if push_to_hub:
            hub: Any = model
            hub.push_to_hub(options.pop("repo_id", output.name), max_shard_size=max_shard_size, **options)


def _write_pretrained(model: Any, output: Path, most: int) -> None:
    record = record_of(model)
    config = copy.deepcopy(model.config)
    settings = settings_of(model)
    check_replaceable(output)
    make_directory(output)
    for name, content in settings.items():
        write_atomic(output / name, lambda file, content=content: file.write(content))  # type: ignore[misc]  # bound now
    if model.is_remote_code():
        from transformers.dynamic_module_utils import custom_object_save  # the model is of this package

        custom_object_save(model, output, config=config)
    artifact = split(save(model, output, container="safetensors"), most)
    if config.name_or_path:  # a model that was made from its configuration came with none
        _copy_tokenizer(Path(config.name_or_path), output)
    found = described(json.loads(config.to_json_string()), artifact, type(model).__name__)
    write_config(found | {NOTE: {**found[NOTE], "memory": record.memory}}, output)


def settings_of(model: Any) -> dict[str, bytes]:
    """The files of a model's configuration and of that of generation, by name.

    Raises:
        ConfigError: transformers does not take one of them.
    """
    with tempfile.TemporaryDirectory() as place:
        try:
            copy.deepcopy(model.config).save_pretrained(place)
            if model.can_generate():
                model.generation_config.save_pretrained(place)
        except ValueError as error:
            raise ConfigError(
                f"its configuration cannot be written: {' '.join(str(error).split())}",
                where=type(model).__name__,
                remedy="Change what is named above, in model.config or model.generation_config.",
            ) from error
        return {file.name: file.read_bytes() for file in Path(place).iterdir()}


def _copy_tokenizer(source: Path, output: Path) -> None:
    """Copy the tokenizer that the model came with, unless the directory has one already."""
    if not source.is_dir() or any((output / name).is_file() for name in TOKENIZER):
        return
    found = companions.find_companions(source, output).copied
    names = [name for name in found if name in TOKENIZER or name.startswith(_TEMPLATES)]
    companions.copy(source, names, output, output)


def is_pretrained(cls: type[nn.Module]) -> bool:
    """Whether a class is one of transformers, which has the folders of `from_pretrained`."""
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.partition(".")[0] == "transformers"
        for base in cls.__mro__
    )


def refuse_save_pretrained(self: nn.Module, *_args: object, **_options: object) -> None:
    """Refuse: `from_pretrained` of another package would read the codes as if they were weights."""
    raise ModelError(
        "save_pretrained would write codes, which from_pretrained would take for weights",
        where=type(self).__name__,
        remedy="Use pared.save(model, directory), and model.config.save_pretrained(directory) for the configuration.",
    )
