"""Upstream's zuul-fingergw, as its command line starts it: each run in a process of its own, forked
from this one, which has imported all of it already. The argument is the home of whoever runs it."""

import json
import os
import sys
import tempfile
import traceback

import lines
from zuul.cmd import fingergw


def run(arguments):
    """What comes of these arguments, a JSON list: exit status, standard output, standard error."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        pid = os.fork()
        if pid == 0:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            os._exit(program(json.loads(arguments)))
        _, status = os.waitpid(pid, 0)
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode())
        return [os.waitstatus_to_exitcode(status), *texts]


def program(arguments):
    """Runs it, and returns the exit status that Python would end with."""
    sys.argv = ['zuul-fingergw', *arguments]
    os.environ['HOME'] = sys.orig_argv[-1]
    try:
        fingergw.main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


lines.serve({'run': run})
