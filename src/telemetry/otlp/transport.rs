//! The collector: dialed with our TLS, for gRPC and for HTTP.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use async_trait::async_trait;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{HOST, HeaderValue};
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use opentelemetry_http::{HttpClient, HttpError};
use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use crate::config::{Protocol, Tracing};
use crate::tls;

/// More of an answer is not read, in bytes: it says nothing but which spans were refused.
const ANSWER_MAX: usize = 64 * 1024;

/// Silence on a connection before it is probed: no build may end for hours, and firewalls forget.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// Tries the files of TLS that `config` names.
///
/// # Errors
/// What is wrong with them.
pub(crate) fn check(config: Option<&Tracing>) -> Result<()> {
    config.map(Collector::new).map_or(Ok(()), |collector| collector.connector().map(drop))
}

/// Either kind of connection.
trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// How to reach it.
#[derive(Clone, Debug)]
pub(crate) struct Collector(Arc<Tracing>);

impl Collector {
    pub(crate) fn new(config: &Tracing) -> Self {
        Self(Arc::new(config.clone()))
    }

    /// Connections for gRPC, each made when it is needed.
    pub(crate) fn channel(&self) -> Result<Channel> {
        let endpoint = Endpoint::from_shared(self.0.endpoint.to_string()).context("tracing")?;
        let collector = self.clone();
        let dial = service_fn(move |_: Uri| {
            let collector = collector.clone();
            async move { collector.dial().await.map(TokioIo::new) }
        });
        Ok(endpoint.timeout(self.0.timeout).connect_with_connector_lazy(dial))
    }

    /// What shakes hands, of the files as they are now: certificates are renewed. `None` without TLS.
    fn connector(&self) -> Result<Option<tokio_rustls::TlsConnector>> {
        let Tracing { endpoint, identity, authorities, protocol, .. } = &*self.0;
        if !endpoint.tls {
            return Ok(None);
        }
        let protocol: &[u8] = match protocol {
            Protocol::Grpc => b"h2",
            Protocol::HttpProtobuf => b"http/1.1",
        };
        let identity = identity.as_ref().map(|(cert, key)| (cert.as_path(), key.as_path()));
        tls::collector_connector(identity, authorities.as_deref(), protocol).map(Some)
    }

    async fn dial(&self) -> io::Result<Box<dyn Io>> {
        timeout(self.0.timeout, self.connect()).await?
    }

    async fn connect(&self) -> io::Result<Box<dyn Io>> {
        let endpoint = &self.0.endpoint;
        let connector = self.connector().map_err(|error| io::Error::other(format!("{error:#}")))?;
        let stream = TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await?;
        stream.set_nodelay(true)?;
        // One that has vanished is found by what it does not acknowledge, or by silence before that, and
        // dialed anew.
        let socket = SockRef::from(&stream);
        socket.set_tcp_user_timeout(Some(self.0.timeout))?;
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE))?;
        let Some(connector) = connector else { return Ok(Box::new(stream)) };
        let name = ServerName::try_from(endpoint.host.clone()).map_err(io::Error::other)?;
        let connected = connector.connect(name, stream).await;
        let stream = connected.map_err(|error| io::Error::other(tls::describe(&error)))?;
        Ok(Box::new(stream))
    }
}

/// One connection for each request: they are seconds apart, and none has to be found broken.
#[async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (mut head, body) = request.into_parts();
        head.headers.insert(HOST, HeaderValue::from_str(&self.0.endpoint.authority())?);
        head.uri = self.0.endpoint.path.parse()?;
        let stream = TokioIo::new(self.dial().await?);
        let (mut sender, connection) = http1::handshake(stream).await?;
        let answered = async {
            let request = Request::from_parts(head, Full::new(body));
            let (head, body) = sender.send_request(request).await?.into_parts();
            let body = Limited::new(body, ANSWER_MAX).collect().await?.to_bytes();
            Ok::<_, HttpError>(Response::from_parts(head, body))
        };
        let connection = async {
            connection.await?;
            std::future::pending::<Result<_, HttpError>>().await
        };
        timeout(self.0.timeout, async {
            tokio::select! {
                biased;
                answered = answered => answered,
                failed = connection => failed,
            }
        })
        .await?
    }
}
