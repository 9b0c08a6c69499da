"""The console streaming of zuul-web: its own websocket handler, stream manager and streamer. Only
the websocket itself, the login and the rest of the web server are replaced.

    web.py ZUUL_CONF

It reads [web] zone and [fingergw] tls_* as zuul-web does and prints {"manager": "running"} when the
stream manager runs. Commands:

    open UUID    a browser opens a build's console
    leave UUID   that browser disconnects
    manager      {"alive": whether its thread runs, "streamers": how many consoles it serves}

The data for the browser is printed as {"build": UUID, "text": TEXT} for every frame and as
{"build": UUID, "closed": CODE, "reason": TEXT}.
"""

import json
import logging
import sys
from types import SimpleNamespace

from zuul.lib.config import get_default
from zuul.web import LogStreamHandler, StreamManager
from zuul.zk.components import COMPONENT_REGISTRY
from zuul.zk.executor import ExecutorApi

import lines


class Gauge:
    def set(self, value):
        pass


class Browser(LogStreamHandler):
    """zuul-web's handler, with lines on stdout in place of the browser."""

    def __init__(self, web, build):
        # The base classes need a CherryPy request and a socket.
        self.log = logging.getLogger('zuul.web')
        self.streamer = None
        self.zuulweb = web
        self.tenant_name = 'tenant-one'
        self.auth_context = SimpleNamespace(validate=lambda token: None)
        self.build = build

    def send(self, payload, binary=False):
        assert not binary
        lines.say(build=self.build, text=payload)

    def close(self, code=1000, reason=''):
        lines.say(build=self.build, closed=code, reason=reason)


class Web:
    """The attributes of ZuulWeb that LogStreamHandler uses, with ZuulWeb's values."""

    def __init__(self, config, client):
        self.zone = get_default(config, 'web', 'zone')
        self.finger_tls_key = get_default(config, 'fingergw', 'tls_key')
        self.finger_tls_cert = get_default(config, 'fingergw', 'tls_cert')
        self.finger_tls_ca = get_default(config, 'fingergw', 'tls_ca')
        self.finger_tls_verify_hostnames = get_default(
            config, 'fingergw', 'tls_verify_hostnames', default=True)
        COMPONENT_REGISTRY.create(client)
        self.executor_api = ExecutorApi(client, use_cache=False)
        self.stream_manager = StreamManager(None, SimpleNamespace(streamers=Gauge()))
        self.stream_manager.start()
        self.browsers = {}

    def open(self, build):
        browser = self.browsers[build] = Browser(self, build)
        request = {'uuid': build, 'logfile': 'console.log', 'token': None}
        browser.received_message(SimpleNamespace(
            is_text=True, data=json.dumps(request).encode('utf8')))

    def leave(self, build):
        self.browsers.pop(build).closed(1001)

    def manager(self):
        manager = self.stream_manager
        return {'alive': manager.thread.is_alive(), 'streamers': len(manager.streamers)}


def main():
    config, client = lines.connect(sys.argv[1])
    web = Web(config, client)
    lines.say(manager='running')
    lines.serve({'open': web.open, 'leave': web.leave, 'manager': web.manager})


main()
