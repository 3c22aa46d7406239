"""Caption bytes to text."""

import json

MAX_CAPTION_BYTES = 1 << 16
"""A longer text is a page or a binary file, not a caption; no model reads so far, but the tokenizer would."""
MAX_JSON_BYTES = 1 << 20
"""The same for a JSON file that holds a caption beside metadata."""


def decode_caption(data: bytes) -> str:
    """Decodes a caption file: UTF-8, with or without a byte order mark.

    Raises:
        ValueError: for an empty, overlong or binary caption.
    """
    if len(data) > MAX_CAPTION_BYTES:  # before the work of decoding
        raise ValueError(f"caption of {len(data)} bytes exceeds the limit of {MAX_CAPTION_BYTES}")
    return clean_caption(data.decode("utf-8-sig"))


def decode_json_caption(data: bytes) -> str:
    """Takes the value of `caption` from a JSON object, as img2dataset writes them.

    Raises:
        ValueError: for anything else, and as `decode_caption`.
    """
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"JSON of {len(data)} bytes exceeds the limit of {MAX_JSON_BYTES}")
    try:
        content = json.loads(data)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    caption = content.get("caption") if isinstance(content, dict) else None
    if not isinstance(caption, str):
        raise ValueError("no text under the key 'caption'")
    return clean_caption(caption)


def clean_caption(caption: str) -> str:
    """Returns a caption without white space around it.

    Raises:
        ValueError: if it is empty, longer than `MAX_CAPTION_BYTES`, holds NUL or half a surrogate pair, which `\\u`
            escapes of JSON can spell and no tokenizer takes.
    """
    caption = caption.strip()
    if not caption:
        raise ValueError("empty caption")
    if "\0" in caption:
        raise ValueError("NUL in the caption: binary data?")
    num_bytes = len(caption.encode("utf-8"))
    if num_bytes > MAX_CAPTION_BYTES:
        raise ValueError(f"caption of {num_bytes} bytes exceeds the limit of {MAX_CAPTION_BYTES}")
    return caption
