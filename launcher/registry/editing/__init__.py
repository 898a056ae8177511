"""Editing a registry's text in place: one value or one entry changes, every other byte stays.

    edited = set_value(text, "model_registry.yml", "gpt-oss-20b", "max-num-seqs", "8")
    edited = add_entry(text, "model_registry.yml", "mine", [("model", "org/name"), ("max-num-seqs", "8")])
    write_registry(path, edited, expected=text)        # atomic; refuses when somebody else wrote meanwhile

Knows: positions, quoting, indentation. Refuses to know: what a value means; the loader judges the result before anyone
may write it. Errors: EditRefused, RegistryInvalid, UnknownName, OverrideError.
"""

from __future__ import annotations

from launcher.registry.editing.edits import ClusterPart, Edit, add_entry, begin_registry, set_value
from launcher.registry.editing.files import read_text, write_registry, write_starter
from launcher.registry.editing.ranges import EditRefused
from launcher.registry.editing.secrets import secret_values
from launcher.registry.editing.writing import yaml_text, yaml_value

__all__ = [
    "ClusterPart",
    "Edit",
    "EditRefused",
    "add_entry",
    "begin_registry",
    "read_text",
    "secret_values",
    "set_value",
    "write_registry",
    "write_starter",
    "yaml_text",
    "yaml_value",
]
