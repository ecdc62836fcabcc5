//! Who calls: what is known of a caller, as attributes that grants are about.

/// A caller, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    name: String,
    attributes: Vec<(&'static str, String)>,
}

impl Identity {
    /// Of whom nothing is known.
    pub fn nobody() -> Self {
        Identity::default()
    }

    /// Of a process on the other end of a Unix socket.
    pub fn of_process(uid: u32, gid: u32) -> Self {
        let name = format!("uid:{uid}");
        let attributes = vec![("uid", uid.to_string()), ("gid", gid.to_string())];
        Identity { name, attributes }
    }

    /// Of whoever has shown a certificate: its subject, and names of the kinds `cn`, `o`, `ou`, `dns`,
    /// `uri` and `email`.
    pub fn of_certificate(subject: &str, names: &[(&'static str, String)]) -> Self {
        let first = |kind: &str| names.iter().find(|(found, _)| *found == kind);
        let name = match first("uri").or_else(|| first("cn")) {
            Some((kind, name)) => format!("{kind}:{name}"),
            None => format!("subject:{subject}"),
        };
        let mut attributes = names.to_vec();
        attributes.push(("subject", subject.to_owned()));
        Identity { name, attributes }
    }

    /// Whether nothing is known of it.
    pub fn is_nobody(&self) -> bool {
        self.attributes.is_empty()
    }

    /// An attribute that tells it from others, for logs and messages: `cn:worker`, `uid:1000`.
    pub fn name(&self) -> &str {
        match self.is_nobody() {
            true => "nobody",
            false => &self.name,
        }
    }

    /// All values of an attribute.
    pub fn values<'i>(&'i self, attribute: &'i str) -> impl Iterator<Item = &'i str> {
        self.attributes
            .iter()
            .filter(move |(name, _)| *name == attribute)
            .map(|(_, value)| value.as_str())
    }
}
