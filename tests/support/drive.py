"""A driver for tests: run_generate with an engine of fakes.py, in a process of its own that a test may kill.

python tests/support/drive.py ENGINE [OPTION ...] < job as JSON        the summary, or the error, is the last
line of stdout"""

from __future__ import annotations

import json
import sys

from context_diffusion.cluster.driver import Options, run_generate
from context_diffusion.core.errors import classify
from context_diffusion.core.generate_job import GenerateJob
from support import fakes

if __name__ == "__main__":
    options = Options(**dict.fromkeys(sys.argv[2:], True))
    try:
        summary = run_generate(
            GenerateJob.model_validate(json.load(sys.stdin)), options, getattr(fakes, sys.argv[1])
        )
    except Exception as error:
        summary = classify(error)
    print(json.dumps(summary), flush=True)
