"""`make lock`: every package that offloadd needs, with version and digest of its file, for `pip install --require-hashes`.

Made on the machine that will install, or on one like it: the digests are of the files that its index gives for its Python. It
is not kept in the repository, since another index may have others; Nix has a lock of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys


def main() -> int:
    """Print it; exit 1 when an index does not tell digests."""
    words = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report=-", *(sys.argv[1:] or ["."])]
    told = json.loads(subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True, text=True).stdout)
    packages = [each for each in told["install"] if each["metadata"]["name"] != "offloadd"]
    lines = []
    for each in sorted(packages, key=lambda one: str(one["metadata"]["name"]).lower()):
        name, version = each["metadata"]["name"], each["metadata"]["version"]
        digest = each["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if not digest:
            print(f"lock: the index tells no digest of {name} {version}", file=sys.stderr)
            return 1
        lines.append(f"{name}=={version} --hash=sha256:{digest}")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
