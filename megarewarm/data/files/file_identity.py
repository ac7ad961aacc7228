"""Whether a token file still holds what it held: recorded in checkpoints, compared by whoever reads on in its data.

Neither size nor time of change says that: both are often kept where contents change, and change where contents are copied.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from megarewarm.data.files.manifest import manifest_of
from megarewarm.data.files.token_file import TokenFile


class FileIdentity(BaseModel):
    """What is known of a token file's contents.

    ``fingerprint`` and ``checksum``: those of ``TokenFile``; the first is of samples above 4 MiB, the second of samples of the
    ids above 256 MiB. ``sha256``: of the whole .bin, as its manifest says. (Earlier versions know the fingerprint only; null
    where nothing is known.)
    """

    model_config = ConfigDict(frozen=True)

    path: str
    fingerprint: str
    checksum: str | None = None
    sha256: str | None = None

    def agrees_with(self, other: FileIdentity) -> bool:
        """Whether nothing that is known of both says that they are different tokens."""
        return self.differing(other) is None

    def differing(self, before: FileIdentity) -> str | None:
        """What is known to be different from ``before``, in words; None where nothing is."""
        for what in ("fingerprint", "checksum", "sha256"):
            was, now = getattr(before, what), getattr(self, what)
            if was is not None and now is not None and was != now:
                return f"{'SHA-256 of its manifest' if what == 'sha256' else what} {was[:8]} then, {now[:8]} now"
        return None


def identity_of(file: TokenFile) -> FileIdentity:
    """Of an opened file. Reads up to 256 MiB of it. Raises ``UserError`` where the manifest beside it is another file's."""
    sums = (manifest_of(file.path) or {}).get("sha256")
    sha256 = sums.get("bin") if isinstance(sums, dict) else None
    return FileIdentity(
        path=str(file.path),
        fingerprint=file.fingerprint(),
        checksum=file.checksum(),
        sha256=sha256 if isinstance(sha256, str) else None,
    )
