"""The parts of a scheduler and of an executor that a gateway uses: build requests in ZooKeeper and
the log streamer, all of them Zuul's own classes.

    executor.py ZUUL_CONF JOBS_DIR [ZONE]

It prints {"port": N} when the streamer listens. ZONE is the executor's own zone. Commands:

    submit UUID [ZONE]   the scheduler requests a build, in ZONE's queue or in the one without a zone
    start UUID           the executor accepts it
    pause UUID           the executor pauses it
    complete UUID        the executor completes it; the request stays
    remove UUID          the scheduler removes the request
    sampled yes|no       sets whether the traces of builds requested from now on are sampled

A build is requested within a span, as the scheduler's client does it; `submit` returns the IDs of its
trace, of its span and of the event's span.
"""

import configparser
import sys
import uuid

from opentelemetry import trace

from zuul.lib.log_streamer import LogStreamer
from zuul.lib.tracing import Tracing
from zuul.model import BuildRequest
from zuul.version import get_version_string
from zuul.zk.components import COMPONENT_REGISTRY, ExecutorComponent
from zuul.zk.executor import ExecutorApi

import lines


class Executor:
    hostname = '127.0.0.1'

    def __init__(self, client, port, zone):
        self.port = port
        self.zone = zone
        self.component = ExecutorComponent(client, self.hostname, version=get_version_string())
        self.component.register()
        COMPONENT_REGISTRY.create(client)
        self.component.zone = zone
        self.component.accepting_work = True
        self.component.state = self.component.RUNNING
        self.api = ExecutorApi(client, use_cache=False)
        self.taken = {}
        # As in a system without an exporter: spans exist nevertheless.
        Tracing(configparser.ConfigParser())
        self.is_sampled = True

    def submit(self, build, zone=None):
        span = trace.get_tracer('zuul').start_span('Build')
        context = span.get_span_context()
        if not self.is_sampled:
            span = trace.NonRecordingSpan(trace.SpanContext(
                context.trace_id, context.span_id, False, trace.TraceFlags(0)))
        with trace.use_span(span):
            request = BuildRequest(
                build, zone,
                build_set_uuid=uuid.uuid4().hex,
                job_uuid=uuid.uuid4().hex,
                tenant_name='tenant-one',
                pipeline_name='check',
                event_id=uuid.uuid4().hex,
                precedence=200)
        self.api.submit(request, {'job': 'unit-tests', 'items': []})
        return {
            'trace_id': trace.format_trace_id(context.trace_id),
            'span_id': trace.format_span_id(context.span_id),
            'event_id': request.event_id,
        }

    def sampled(self, wanted):
        self.is_sampled = wanted == 'yes'

    def start(self, build):
        # The steps and the three keys are those of ExecutorServer when it accepts a request.
        request = self.api.getRequest(build)
        if not self.api.lock(request, blocking=False):
            raise RuntimeError('the request is locked')
        request.state = BuildRequest.RUNNING
        request.worker_info = {
            'hostname': self.hostname,
            'log_port': self.port,
            'zone': self.zone,
        }
        self.api.update(request)
        self.api.clearParams(request)
        self.taken[build] = request

    def _change(self, build, state):
        request = self.taken[build]
        request.state = state
        self.api.update(request)

    def pause(self, build):
        self._change(build, BuildRequest.PAUSED)

    def complete(self, build):
        self._change(build, BuildRequest.COMPLETED)
        self.api.unlock(self.taken[build])

    def remove(self, build):
        self.api.remove(self.api.getRequest(build))


def main():
    path, jobs, zone = (sys.argv + [None])[1:4]
    _, client = lines.connect(path)
    streamer = LogStreamer(Executor.hostname, 0, jobs)
    port = streamer.server.server_address[1]
    executor = Executor(client, port, zone)
    lines.say(port=port)
    lines.serve({
        'submit': executor.submit,
        'start': executor.start,
        'pause': executor.pause,
        'complete': executor.complete,
        'remove': executor.remove,
        'sampled': executor.sampled,
    })


main()
