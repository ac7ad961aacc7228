"""Whether a token file's contents are unchanged: recorded in checkpoints, compared by runs that continue in its data. Size
and modification time don't tell: both often stay when contents change, and change when contents are copied."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from megarewarm.data.files.manifest import manifest_of
from megarewarm.data.files.token_file import TokenFile


class FileIdentity(BaseModel):
    """The recorded identity of a token file's contents. ``fingerprint`` and ``checksum``: those of ``TokenFile``; the first
    is of samples above 4 MiB, the second of samples of the ids above 256 MiB. ``sha256``: of the whole .bin, from its
    manifest. (Earlier versions recorded the fingerprint only; null if unknown.)"""

    model_config = ConfigDict(frozen=True)

    path: str
    fingerprint: str
    checksum: str | None = None
    sha256: str | None = None

    def agrees_with(self, other: FileIdentity) -> bool:
        """Whether no recorded value of both shows different tokens."""
        return self.differing(other) is None

    def differing(self, before: FileIdentity) -> str | None:
        """A description of a known difference from ``before``; None without any."""
        for what in ("fingerprint", "checksum", "sha256"):
            was, now = getattr(before, what), getattr(self, what)
            if was is not None and now is not None and was != now:
                return f"{'SHA-256 of its manifest' if what == 'sha256' else what} {was[:8]} then, {now[:8]} now"
        return None


def identity_of(file: TokenFile) -> FileIdentity:
    """Of an opened file. Reads up to 256 MiB of it. Raises ``UserError`` if the manifest beside it is another file's."""
    sums = (manifest_of(file.path) or {}).get("sha256")
    sha256 = sums.get("bin") if isinstance(sums, dict) else None
    return FileIdentity(
        path=str(file.path),
        fingerprint=file.fingerprint(),
        checksum=file.checksum(),
        sha256=sha256 if isinstance(sha256, str) else None,
    )
