"""Signs the values that ranks exchange through torch's store, which accepts requests from any program.

This file must not import other modules of the project: the cluster check sends it to nodes that may lack the project.
"""

import hmac
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_DIGEST_BYTES = 32


class ForgedValueError(RuntimeError):
    """Reports that a value in the store was not written by a rank of this run."""


class KeyedStore(dist.Store):
    """Stores each value with a keyed digest (HMAC-SHA256), and verifies the digest when a value is read.

    The digest covers the value and the name under which it is stored. Torch's process groups also use this store, so
    the addresses that gloo exchanges are signed. Deletions and counters are not protected. An attacker can still
    restore an older value under the same name.
    """

    def __init__(self, store: dist.Store, key: bytes) -> None:
        """Wraps a store of torch.

        Args:
            store: store to wrap.
            key: secret that all ranks share.
        """
        super().__init__()
        self._store, self._key = store, key

    def set(self, key: str, value: str | bytes) -> None:
        """Stores a value with its digest."""
        content = value.encode() if isinstance(value, str) else bytes(value)
        self._store.set(key, self._digest(key, content) + content)  # type: ignore[arg-type] # torch takes bytes too

    def get(self, key: str) -> bytes:
        """Waits until a key has a value, verifies the digest and returns the value.

        Raises:
            ForgedValueError: if the digest is wrong. A wrong digest means that no rank of this run wrote the value.
        """
        return self._verify(key, self._store.get(key))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Waits until all keys have values, verifies the digests and returns the values (see `get`)."""
        return [self._verify(key, value) for key, value in zip(keys, self._store.multi_get(keys), strict=True)]

    def check(self, keys: list[str]) -> bool:
        """Returns whether all keys exist. The values are not verified."""
        return self._store.check(keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Waits until all keys exist. The values are not verified."""
        self._store.wait(keys, *([] if timeout is None else [timeout]))

    def add(self, key: str, value: int) -> int:
        """Adds `value` to a counter and returns the new count. Counters are not protected by a digest."""
        return self._store.add(key, value)

    def delete_key(self, key: str) -> bool:
        """Deletes a key and returns whether the key existed."""
        return self._store.delete_key(key)

    def set_timeout(self, timeout: timedelta) -> None:
        """Sets the time limit of a request to the store."""
        self._store.set_timeout(timeout)

    @property
    def timeout(self) -> Any:
        """Returns the time limit of a request to the store."""
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
