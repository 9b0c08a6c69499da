"""Protocol between these scripts and the Rust tests: one command per line on stdin, one JSON object per line
on stdout. End of stdin ends the script."""

import configparser
import json
import logging
import os
import sys
import threading

from zuul.zk import ZooKeeperClient

_stdout = threading.Lock()


def say(**fact):
    """Prints one message; Zuul's own threads call this, too."""
    with _stdout:
        print(json.dumps(fact, default=str), flush=True)


def connect(path):
    """Reads a zuul.conf and connects to its ZooKeeper, both as Zuul's programs do."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO,
        format='%(levelname)s %(name)s: %(message)s')
    config = configparser.ConfigParser()
    with open(path) as f:
        config.read_file(f)
    client = ZooKeeperClient.fromConfig(config)
    client.connect()
    return config, client


def serve(commands):
    """Calls commands[word](*words) for every line until stdin ends.

    The result of the call is printed as the response. A command that fails prints its error, and the
    next one is still served.
    """
    for line in sys.stdin:
        word, *words = line.split()
        try:
            say(done=word, result=commands[word](*words))
        except Exception as e:
            logging.exception('%s', line.strip())
            say(failed=word, error=repr(e))
    # Zuul's streaming threads are not daemons and would block a normal exit.
    os._exit(0)
