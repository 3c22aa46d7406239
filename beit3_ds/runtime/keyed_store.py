"""Signs the values that ranks exchange through torch's store, which accepts requests from anyone.

The cluster check sends this file to nodes that may lack the project, so it imports nothing else of the project.
"""

import hmac
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_DIGEST_BYTES = 32


class ForgedValueError(RuntimeError):
    """Reports a value in the store that no rank of this run wrote."""


class KeyedStore(dist.Store):
    """Writes each value with a digest under a secret key, and verifies the digest before it returns a value.

    The digest covers the value and its name. Torch's process groups use this store too, so gloo's addresses are signed.
    Deletions and counters are not protected, and an attacker may replay an older value under its own name.
    """

    def __init__(self, store: dist.Store, key: bytes) -> None:
        """Wraps a store.

        Args:
            store: torch's store.
            key: secret of the ranks.
        """
        super().__init__()
        self._store, self._key = store, key

    def set(self, key: str, value: str | bytes) -> None:
        """Stores a value with its digest."""
        content = value.encode() if isinstance(value, str) else bytes(value)
        self._store.set(key, self._digest(key, content) + content)  # type: ignore[arg-type] # torch takes bytes too

    def get(self, key: str) -> bytes:
        """Waits until a key has a value, and returns the value after verifying its digest.

        Raises:
            ForgedValueError: if the digest is wrong, so no rank with this secret wrote the value.
        """
        return self._verify(key, self._store.get(key))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Waits until all keys have values, and returns the values after verifying their digests (`get`)."""
        return [self._verify(key, value) for key, value in zip(keys, self._store.multi_get(keys), strict=True)]

    def check(self, keys: list[str]) -> bool:
        """Returns whether all keys exist; does not verify their values."""
        return self._store.check(keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Waits until all keys exist; does not verify their values."""
        self._store.wait(keys, *([] if timeout is None else [timeout]))

    def add(self, key: str, value: int) -> int:
        """Adds `value` to a counter and returns the new count; counters carry no digest."""
        return self._store.add(key, value)

    def delete_key(self, key: str) -> bool:
        """Deletes a key and returns whether it existed."""
        return self._store.delete_key(key)

    def set_timeout(self, timeout: timedelta) -> None:
        """Sets how long a request to the store may take."""
        self._store.set_timeout(timeout)

    @property
    def timeout(self) -> Any:
        """Returns how long a request to the store may take."""
        return self._store.timeout  # type: ignore[attr-defined] # missing in torch's stubs

    def _digest(self, key: str, content: bytes) -> bytes:
        name = key.encode()
        return hmac.digest(self._key, len(name).to_bytes(8, "big") + name + content, "sha256")

    def _verify(self, key: str, signed: bytes) -> bytes:
        digest, content = signed[:_DIGEST_BYTES], signed[_DIGEST_BYTES:]
        if not hmac.compare_digest(digest, self._digest(key, content)):
            raise ForgedValueError(
                f"the store where ranks meet holds a value of {key!r} that no rank of this run wrote: its digest is "
                "wrong. A program on the network writes into the store: close its port to all but the ranks' hosts"
            )
        return content
