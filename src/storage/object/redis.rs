//! Redis, and servers that speak as it does.
//!
//! 1. A value that is written in parts has another name, and goes after a day, until all of it is there.
//! 2. A connection whose answer does not come in time is not used any more.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, stream};
use parking_lot::Mutex;
use redis::{
    AsyncConnectionConfig, Cmd, ErrorKind, FromRedisValue, RedisConnectionInfo, RedisError,
    ServerErrorKind, aio::MultiplexedConnection,
};
use uuid::Uuid;

use super::attempt::{FailedAttempt, Pieces, WrittenPart};
use crate::{
    config::object_storage::{ObjectService, Redis as Config},
    daemon::{self, Credentials},
    storage::{
        Error,
        retry::Transience,
        single_flight::{Role, SingleFlight},
    },
};

/// What is read or written by one command.
const PIECE: u64 = 1 << 20;

/// Each is driven by one thread at each end.
const CONNECTIONS: usize = 4;

/// How long a value may be without a new part, in seconds.
const PART_LIFETIME: u64 = 24 * 60 * 60;

/// A database of a server. Cheap to clone.
#[derive(Clone)]
pub(super) struct Redis(Arc<RedisState>);

struct RedisState {
    config: Config,
    credentials: Credentials,
    timeout: Duration,
    connections: [Mutex<Option<MultiplexedConnection>>; CONNECTIONS],
    next: AtomicUsize,
    connecting: SingleFlight<usize, Result<MultiplexedConnection, String>>,
}

/// A value that is written in parts.
pub(super) struct RedisWrite {
    redis: Redis,
    name: String,
    temporary: String,
}

impl Redis {
    /// Of a string.
    pub(super) const LARGEST_VALUE: u64 = 512 << 20;
    /// Commands at a time, which travel together.
    pub(super) const CONCURRENCY: usize = 256;

    pub(super) fn new(config: &Config, credentials: &Credentials, timeout: Duration) -> Self {
        Redis(Arc::new(RedisState {
            config: config.clone(),
            credentials: credentials.clone(),
            timeout,
            connections: Default::default(),
            next: AtomicUsize::new(0),
            connecting: SingleFlight::default(),
        }))
    }

    pub(super) async fn probe(&self) -> Result<(), FailedAttempt> {
        self.ask::<String>(&redis::cmd("PING")).await.map(drop)
    }

    pub(super) async fn size(&self, name: &str) -> Result<Option<u64>, FailedAttempt> {
        let size: u64 = self.ask(redis::cmd("STRLEN").arg(name)).await?;
        Ok((size > 0).then_some(size))
    }

    pub(super) async fn read(
        &self,
        name: &str,
        range: Range<u64>,
        size: u64,
    ) -> Result<Option<Pieces>, FailedAttempt> {
        let first = self.piece(name, &range, size).await?;
        if first.is_empty() {
            return Ok(None);
        }
        let state = (self.clone(), name.to_owned(), range);
        let rest = stream::try_unfold((state, Some(first)), move |(state, first)| async move {
            let (redis, name, mut range) = state;
            let piece = match first {
                Some(piece) => piece,
                None if range.is_empty() => return Ok(None),
                None => redis.piece(&name, &range, size).await?,
            };
            if piece.is_empty() {
                return Ok(None);
            }
            range.start += piece.len() as u64;
            Ok(Some((piece, ((redis, name, range), None))))
        });
        Ok(Some(rest.boxed()))
    }

    /// The next bytes; empty when there are none. Of the last piece of a value, what it has too much.
    async fn piece(
        &self,
        name: &str,
        range: &Range<u64>,
        size: u64,
    ) -> Result<Bytes, FailedAttempt> {
        let end = (range.start + PIECE).min(range.end);
        let last = if end == size { end } else { end - 1 };
        let mut command = redis::cmd("GETRANGE");
        self.ask(command.arg(name).arg(range.start).arg(last)).await
    }

    pub(super) async fn read_all(
        &self,
        name: &str,
        most: u64,
    ) -> Result<Option<Bytes>, FailedAttempt> {
        let mut command = redis::cmd("GETRANGE");
        let value: Bytes = self.ask(command.arg(name).arg(0).arg(most)).await?;
        if value.len() as u64 > most {
            let text = format!("{} has more than {most} bytes for {name}", self.place());
            return Err(FailedAttempt::permanent(Error::Internal(text)));
        }
        Ok((!value.is_empty()).then_some(value))
    }

    pub(super) async fn write(&self, name: &str, value: Bytes) -> Result<(), FailedAttempt> {
        let mut command = redis::cmd("SET");
        self.ask::<()>(command.arg(name).arg(&*value)).await
    }

    pub(super) fn begin(&self, name: &str) -> RedisWrite {
        RedisWrite {
            redis: self.clone(),
            name: name.to_owned(),
            temporary: format!("{name}.{}", Uuid::new_v4()),
        }
    }

    pub(super) fn place(&self) -> String {
        self.0.config.endpoint.to_string()
    }

    /// One command, whose answer comes in time.
    async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, FailedAttempt> {
        let number = self.0.next.fetch_add(1, Ordering::Relaxed) % CONNECTIONS;
        let mut connection = self.connection(number).await?;
        let answer = tokio::time::timeout(self.0.timeout, command.query_async(&mut connection));
        match answer.await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => {
                if error.is_unrecoverable_error() || error.is_io_error() {
                    self.forget(number);
                }
                Err(self.failure(&error))
            }
            Err(_) => {
                self.forget(number);
                let seconds = self.0.timeout.as_secs_f64();
                let text = format!("{} was silent for {seconds} seconds", self.place());
                Err(FailedAttempt::unavailable(text))
            }
        }
    }

    fn forget(&self, number: usize) {
        *self.0.connections[number].lock() = None;
    }

    /// One of the connections; made by whoever needs it first.
    async fn connection(&self, number: usize) -> Result<MultiplexedConnection, FailedAttempt> {
        loop {
            let flight = {
                let connection = self.0.connections[number].lock();
                match &*connection {
                    Some(connection) => return Ok(connection.clone()),
                    None => self.0.connecting.join(number),
                }
            };
            let result = match flight {
                Role::Follower(follower) => match follower.result().await {
                    Some(result) => result,
                    // Whoever connected for us left.
                    None => continue,
                },
                Role::Leader(leader) => {
                    let result = match self.connect().await {
                        Ok(connection) => Ok(connection),
                        Err(failed) => {
                            leader.finish(Err(failed.error.to_string()));
                            return Err(failed);
                        }
                    };
                    if let Ok(connection) = &result {
                        *self.0.connections[number].lock() = Some(connection.clone());
                    }
                    leader.finish(result.clone());
                    result
                }
            };
            return result.map_err(FailedAttempt::unavailable);
        }
    }

    async fn connect(&self) -> Result<MultiplexedConnection, FailedAttempt> {
        let Config {
            endpoint,
            database,
            username,
            ..
        } = &self.0.config;
        let stream = daemon::dial(&endpoint.0, &self.0.credentials).await;
        let stream = stream.map_err(|why| FailedAttempt::unavailable(format!("redis: {why}")))?;
        let mut who = RedisConnectionInfo::default()
            .set_db(i64::from(*database))
            .set_skip_set_lib_name();
        if !username.is_empty() {
            who = who.set_username(username);
        }
        if let Some(password) = self.0.credentials.secret(ObjectService::Redis.secret_key()) {
            who = who.set_password(password.as_str());
        }
        // The time is ours to keep.
        let options = AsyncConnectionConfig::new().set_response_timeout(None);
        let greeting = MultiplexedConnection::new_with_config(&who, stream, options);
        match tokio::time::timeout(self.0.timeout, greeting).await {
            Ok(Ok((connection, driver))) => {
                tokio::spawn(driver);
                Ok(connection)
            }
            Ok(Err(error)) => Err(self.failure(&error)),
            Err(_) => {
                let text = format!("{} accepts connections, and does not answer", self.place());
                Err(FailedAttempt::unavailable(text))
            }
        }
    }

    /// What an error means, and who must act.
    fn failure(&self, error: &RedisError) -> FailedAttempt {
        let place = self.place();
        let text = format!("{place}: {error}");
        let permanent =
            |remedy: &str| FailedAttempt::permanent(Error::Internal(format!("{text}; {remedy}")));
        match (error.kind(), error.code()) {
            (_, Some("OOM")) => FailedAttempt {
                error: Error::Full(format!(
                    "{text}; raise its maxmemory, or have it evict what is old: maxmemory-policy allkeys-lru"
                )),
                transience: Transience::Doubtful,
            },
            (_, Some("MISCONF")) => FailedAttempt {
                error: Error::Full(format!("{text}; look at the server's disk and log")),
                transience: Transience::Doubtful,
            },
            (ErrorKind::AuthenticationFailed, _) | (_, Some("WRONGPASS" | "NOAUTH")) => permanent(
                "name the file with its password with storage.redis.password_file, and the user with storage.redis.username",
            ),
            (ErrorKind::Server(ServerErrorKind::NoPerm), _) => permanent(
                "let its user PING, STRLEN, GETRANGE, SET, SETRANGE, EXPIRE, RENAME, PERSIST and DEL",
            ),
            (ErrorKind::Server(ServerErrorKind::ReadOnly), _) => {
                permanent("it is a replica; write where the primary is with storage.redis.endpoint")
            }
            (ErrorKind::Server(ServerErrorKind::Moved | ServerErrorKind::CrossSlot), _) => {
                permanent(
                    "it is part of a cluster, which is not supported; name a server of its own",
                )
            }
            (
                ErrorKind::Server(
                    ServerErrorKind::BusyLoading
                    | ServerErrorKind::TryAgain
                    | ServerErrorKind::MasterDown
                    | ServerErrorKind::ClusterDown,
                ),
                _,
            ) => FailedAttempt::unavailable(text),
            (ErrorKind::Server(_) | ErrorKind::Extension | ErrorKind::UnexpectedReturnType, _) => {
                FailedAttempt::permanent(Error::Internal(text))
            }
            _ => FailedAttempt::unavailable(text),
        }
    }
}

impl RedisWrite {
    pub(super) async fn part(
        &self,
        offset: u64,
        data: Bytes,
    ) -> Result<WrittenPart, FailedAttempt> {
        for (number, piece) in data.chunks(PIECE as usize).enumerate() {
            let at = offset + number as u64 * PIECE;
            let mut command = redis::cmd("SETRANGE");
            let command = command.arg(&self.temporary).arg(at).arg(piece);
            self.redis.ask::<()>(command).await?;
        }
        let mut command = redis::cmd("EXPIRE");
        let command = command.arg(&self.temporary).arg(PART_LIFETIME);
        self.redis.ask::<()>(command).await?;
        Ok(WrittenPart(String::new()))
    }

    pub(super) async fn finish(&self) -> Result<(), FailedAttempt> {
        let mut command = redis::cmd("RENAME");
        let command = command.arg(&self.temporary).arg(&self.name);
        self.redis.ask::<()>(command).await?;
        // With its name it took along when it goes.
        let mut command = redis::cmd("PERSIST");
        self.redis.ask::<()>(command.arg(&self.name)).await
    }

    pub(super) async fn abandon(&self) {
        let mut command = redis::cmd("DEL");
        // It goes by itself otherwise.
        let _ = self.redis.ask::<()>(command.arg(&self.temporary)).await;
    }
}
