"""Tests `[tracing]` in a zuul.conf with Zuul's services."""

import configparser
import json
import os

import lines
from zuul.lib.tracing import Tracing


def take(text):
    """Returns whether they start with these lines in the section, a JSON string. Uses a separate process,
    because some values end the process."""
    config = configparser.ConfigParser()
    config.read_string('[tracing]\n' + json.loads(text))
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        status = 1
        try:
            Tracing(config)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return status == 0


lines.serve({'take': take})
