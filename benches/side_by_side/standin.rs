//! The stand-in mailbox server of all proxies: it accepts every login, and uses little CPU time.
//!
//! It answers `FETCH n` with a literal of n MiB, and reads the literal of `APPEND`. It also answers auth_http requests of nginx,
//! so that their CPU time is not counted for nginx. It prints its ports, and ends when its standard input closes.

use std::io::Read as _;
use std::path::Path;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::certificate;

const GREETING: &[u8] = b"* OK [CAPABILITY IMAP4rev1 SASL-IR LITERAL+ AUTH=PLAIN IDLE] ready\r\n";
const MIB: usize = 1 << 20;
const BLOCKS: usize = 8;
static BLOCK: [u8; MIB / BLOCKS] = [b'x'; MIB / BLOCKS];

pub(crate) fn run() -> anyhow::Result<()> {
    let folder = std::env::args().nth(1).ok_or(anyhow::anyhow!("no folder"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(Path::new(&folder)))
}

async fn serve(folder: &Path) -> anyhow::Result<()> {
    let plain = listen()?;
    let tls = listen()?;
    let directory = listen()?;
    let acceptor = TlsAcceptor::from(certificate::server(folder)?);
    let mail = plain.local_addr()?;
    println!("{} {} {}", mail.port(), tls.local_addr()?.port(), directory.local_addr()?.port());
    tokio::spawn(async move {
        while let Ok((socket, _)) = plain.accept().await {
            let _ = socket.set_nodelay(true);
            tokio::spawn(connection(socket));
        }
    });
    tokio::spawn(async move {
        while let Ok((socket, _)) = tls.accept().await {
            let _ = socket.set_nodelay(true);
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                if let Ok(stream) = acceptor.accept(socket).await {
                    connection(stream).await;
                }
            });
        }
    });
    tokio::spawn(async move {
        while let Ok((socket, _)) = directory.accept().await {
            tokio::spawn(auth_http(socket, mail.port()));
        }
    });
    // The input closes when the driver ends, for whatever reason.
    let ended = || std::io::stdin().read_to_end(&mut Vec::new());
    tokio::task::spawn_blocking(ended).await??;
    Ok(())
}

fn listen() -> anyhow::Result<TcpListener> {
    let socket = tokio::net::TcpSocket::new_v4()?;
    socket.bind("127.0.0.1:0".parse()?)?;
    Ok(socket.listen(4096)?)
}

async fn connection(stream: impl AsyncRead + AsyncWrite + Unpin) {
    // The clients report broken connections.
    let _ = converse(stream).await;
}

async fn converse(stream: impl AsyncRead + AsyncWrite + Unpin) -> std::io::Result<()> {
    let mut stream = BufReader::with_capacity(4096, stream);
    send(&mut stream, GREETING).await?;
    let mut line = Vec::new();
    loop {
        line.clear();
        if stream.read_until(b'\n', &mut line).await? == 0 {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&line).into_owned();
        let mut words = text.split_whitespace();
        let (tag, command) = (words.next().unwrap_or("*"), words.next().unwrap_or("").to_ascii_uppercase());
        let first = words.next().unwrap_or("");
        let answer = match command.as_str() {
            "CAPABILITY" => format!("* CAPABILITY IMAP4rev1 SASL-IR LITERAL+ AUTH=PLAIN IDLE\r\n{tag} OK done\r\n"),
            "LOGIN" => {
                skip_literals(&mut stream, &text).await?;
                format!("{tag} OK logged in\r\n")
            }
            "AUTHENTICATE" => format!("{tag} OK logged in\r\n"),
            "IDLE" => "+ idling\r\n".to_owned(),
            "LOGOUT" => {
                send(&mut stream, format!("* BYE\r\n{tag} OK done\r\n").as_bytes()).await?;
                return stream.shutdown().await;
            }
            "FETCH" => {
                let count: usize = first.parse().unwrap_or(0);
                send(&mut stream, format!("* 1 FETCH (BODY[] {{{}}}\r\n", count * MIB).as_bytes()).await?;
                for _ in 0..count * BLOCKS {
                    stream.write_all(&BLOCK).await?;
                    // Let other connections proceed while a fast proxy reads.
                    tokio::task::yield_now().await;
                }
                format!(")\r\n{tag} OK done\r\n")
            }
            "APPEND" => {
                skip_literals(&mut stream, &text).await?;
                format!("{tag} OK done\r\n")
            }
            _ => format!("{tag} OK done\r\n"),
        };
        send(&mut stream, answer.as_bytes()).await?;
    }
}

async fn send(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> std::io::Result<()> {
    stream.write_all(bytes).await?;
    stream.flush().await
}

/// Reads all literals of a command; each is announced at the end of a line.
async fn skip_literals<S>(stream: &mut BufReader<S>, line: &str) -> std::io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut line = line.trim_end().to_owned();
    while let Some(size) =
        line.strip_suffix('}').and_then(|line| line.rsplit_once('{')).map(|(_, size)| size.to_owned())
    {
        if !size.ends_with('+') {
            send(stream, b"+ go\r\n").await?;
        }
        let mut left: usize = size.trim_end_matches('+').parse().unwrap_or(0);
        let mut buffer = vec![0; left.min(256 * 1024)];
        while left > 0 {
            let wanted = left.min(buffer.len());
            match stream.read(&mut buffer[..wanted]).await? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                read => left -= read,
            }
        }
        let mut rest = Vec::new();
        stream.read_until(b'\n', &mut rest).await?;
        line = String::from_utf8_lossy(&rest).trim_end().to_owned();
    }
    Ok(())
}

async fn auth_http(socket: tokio::net::TcpStream, port: u16) {
    let mut stream = BufReader::new(socket);
    let mut line = String::new();
    while stream.read_line(&mut line).await.is_ok_and(|read| read > 2) {
        line.clear();
    }
    let answer = format!("HTTP/1.0 200 OK\r\nAuth-Status: OK\r\nAuth-Server: 127.0.0.1\r\nAuth-Port: {port}\r\n\r\n");
    let _ = stream.write_all(answer.as_bytes()).await;
}
