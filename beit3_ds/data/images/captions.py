"""Decodes captions from bytes to text."""

import json

MAX_CAPTION_BYTES = 1 << 16
"""Maximum bytes of a caption; a longer text is probably a whole page or a binary file."""
MAX_JSON_BYTES = 1 << 20
"""Maximum bytes of a JSON file that contains a caption and metadata."""


def decode_caption(data: bytes) -> str:
    """Decodes a caption from UTF-8 bytes, with or without a byte order mark.

    Raises:
        ValueError: if the caption is empty, too long or binary.
    """
    if len(data) > MAX_CAPTION_BYTES:  # before decoding, which takes time
        raise ValueError(f"caption of {len(data)} bytes exceeds the limit of {MAX_CAPTION_BYTES}")
    return clean_caption(data.decode("utf-8-sig"))


def decode_json_caption(data: bytes) -> str:
    """Decodes a caption from a JSON object with the key `caption`, as img2dataset writes it.

    Raises:
        ValueError: if the JSON is invalid or too long, or the caption is missing, empty, too long or binary.
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
    r"""Returns a caption without surrounding white space.

    Raises:
        ValueError: if the caption is empty, is longer than `MAX_CAPTION_BYTES`, or contains NUL or half a surrogate
            pair. JSON can contain these characters, as `\u` escapes, but no tokenizer accepts them.
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
