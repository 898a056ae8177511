"""Imports: what others configured, as a registry, with a report of what was kept, renamed and dropped.

    imported = from_serve_line("vllm serve org/model -tp 2 --swap-space 4")
    imported.text, imported.changes

Sources: a vLLM `--config` file, a `vllm serve` command line, the seed family's registry with its `.env`.
Pure; the result is read by the loader before it is returned, and by a `judge` that the caller has. Secrets never
enter it. Errors: ImportRefused for a text that is no such thing, RegistryInvalid for one that is no YAML.
"""

from __future__ import annotations

from launcher.registry.importing.changes import Change, Imported, ImportRefused
from launcher.registry.importing.serve_line import from_serve_line
from launcher.registry.importing.yaml_files import from_config_file, from_model_registry

__all__ = ["Change", "ImportRefused", "Imported", "from_config_file", "from_model_registry", "from_serve_line"]
