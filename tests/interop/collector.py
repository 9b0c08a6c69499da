"""A collector of spans for OTLP as Zuul's services use it: OpenTelemetry's own messages, over gRPC's own
server or over HTTP.

    collector.py grpc|http [CERT KEY [CA]]

With CERT and KEY it uses TLS, with CA it requires a client certificate. It prints {"port": N} when it
listens, and {"span": {...}} for every span that it receives.
"""

import gzip
import http.server
import ssl
import sys
import threading
from concurrent import futures

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

import lines


def values(attributes):
    return {a.key: getattr(a.value, a.value.WhichOneof('value')) for a in attributes}


def tell(request, wire):
    for resource in request.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                lines.say(span={
                    'name': span.name,
                    'kind': Span.SpanKind.Name(span.kind),
                    'trace_id': span.trace_id.hex(),
                    'span_id': span.span_id.hex(),
                    'parent_span_id': span.parent_span_id.hex(),
                    'start': span.start_time_unix_nano,
                    'end': span.end_time_unix_nano,
                    'status': Status.StatusCode.Name(span.status.code),
                    'message': span.status.message,
                    'attributes': values(span.attributes),
                    'events': [[e.name, values(e.attributes)] for e in span.events],
                    'resource': values(resource.resource.attributes),
                    'scope': scope.scope.name,
                    'wire': wire,
                })


class Service(TraceServiceServicer):
    def Export(self, request, context):
        metadata = dict(context.invocation_metadata())
        tell(request, {'authorization': metadata.get('authorization'),
                       'peer': context.peer_identity_key()})
        return ExportTraceServiceResponse()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        encoding = self.headers.get('Content-Encoding')
        if encoding == 'gzip':
            body = gzip.decompress(body)
        request = ExportTraceServiceRequest()
        request.ParseFromString(body)
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header('Content-Type', 'application/x-protobuf')
        self.send_header('Content-Length', str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        tell(request, {'encoding': encoding, 'path': self.path, 'host': self.headers['Host'],
                       'type': self.headers['Content-Type']})


def read(path):
    with open(path, 'rb') as f:
        return f.read()


def serve_grpc(cert=None, key=None, ca=None):
    server = grpc.server(futures.ThreadPoolExecutor())
    add_TraceServiceServicer_to_server(Service(), server)
    if cert:
        credentials = grpc.ssl_server_credentials(
            [(read(key), read(cert))], read(ca) if ca else None, ca is not None)
        port = server.add_secure_port('127.0.0.1:0', credentials)
    else:
        port = server.add_insecure_port('127.0.0.1:0')
    server.start()
    return server, port


def serve_http(cert=None, key=None):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    if cert:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, server.server_address[1]


def main():
    protocol, *files = sys.argv[1:]
    server, port = {'grpc': serve_grpc, 'http': serve_http}[protocol](*files)
    lines.say(port=port)
    lines.serve({})


main()
