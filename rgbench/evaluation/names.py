"""Names of image files."""

from __future__ import annotations

import hashlib
import re

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(/[A-Za-z0-9.-]+)*")
MAX_STEM = 80
INDEX = "index.json"


def file_stem(text: str) -> str:
    """Text as part of a file name, distinct for distinct texts.

    Plain text is kept, its slashes as underscores; other text is shortened, with its hash.
    """
    if len(text) <= MAX_STEM and _PLAIN.fullmatch(text):
        return text.replace("/", "_")
    slug = re.sub(r"[^A-Za-z0-9]+", "-", text)[:40].strip("-")
    return f"{slug or 'prompt'}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
