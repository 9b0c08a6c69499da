"""Runs Zuul's own zuul-fingergw with given command lines, each in a process that is forked from this one,
which has imported all modules already. The argument is the home directory of the user."""

import json
import os
import sys
import tempfile
import traceback

import lines
from zuul.cmd import fingergw


def run(arguments):
    """Returns the result of these arguments, a JSON list: exit status, standard output, standard error."""
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
    """Runs the program and returns the exit status that Python would have."""
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
