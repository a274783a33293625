"""The artifact's container: its two records, its index, and files that are written whole or not at all."""

from pared.container.allowance import Allowance
from pared.container.checks import DAMAGED, Place
from pared.container.envelope import FILE_NAMES, Records, artifact_in, find_artifact, kind_of, open_records, records_of
from pared.container.files import (
    File,
    as_path,
    forget,
    make_directory,
    open_file,
    reading,
    write_atomic,
    writing_to,
)
from pared.container.index import ALIGNMENT, ITEM_SIZES, STEP_INDEXES, VERSION, Entry, Index, Part, start_of
from pared.container.parse import parse_entry, parse_index
from pared.container.parts import LARGEST_CONSTANT
from pared.container.safetensors_file import is_safetensors, read_header, write_safetensors
from pared.container.torch_file import write_torch
from pared.container.zip_file import (
    PICKLE,
    Archive,
    Member,
    checked_content,
    inflated,
    is_zip,
    read_archive,
    torch_folder,
)

__all__ = [
    "ALIGNMENT",
    "DAMAGED",
    "FILE_NAMES",
    "ITEM_SIZES",
    "LARGEST_CONSTANT",
    "PICKLE",
    "STEP_INDEXES",
    "VERSION",
    "Allowance",
    "Archive",
    "Entry",
    "File",
    "Index",
    "Member",
    "Part",
    "Place",
    "Records",
    "artifact_in",
    "as_path",
    "checked_content",
    "find_artifact",
    "forget",
    "inflated",
    "is_safetensors",
    "is_zip",
    "kind_of",
    "make_directory",
    "open_file",
    "open_records",
    "parse_entry",
    "parse_index",
    "read_archive",
    "read_header",
    "reading",
    "records_of",
    "start_of",
    "torch_folder",
    "write_atomic",
    "write_safetensors",
    "write_torch",
    "writing_to",
]
