//! Who calls: what is known of a caller, as attributes that grants are about.

/// Bytes of a value that a token's bearer is named by: each of his operations has it.
const LONGEST_NAME: usize = 255;

/// A caller, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    name: String,
    attributes: Vec<(String, String)>,
}

impl Identity {
    /// Of whom nothing is known.
    pub fn nobody() -> Self {
        Identity::default()
    }

    /// Of a process on the other end of a Unix socket.
    pub fn of_process(uid: u32, gid: u32) -> Self {
        let name = format!("uid:{uid}");
        let attributes = [("uid", uid), ("gid", gid)];
        let attributes = attributes.map(|(name, id)| (name.to_owned(), id.to_string()));
        let attributes = attributes.to_vec();
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
        let names = names.iter();
        let mut attributes: Vec<(String, String)> = names
            .map(|(kind, name)| ((*kind).to_owned(), name.clone()))
            .collect();
        attributes.push(("subject".to_owned(), subject.to_owned()));
        Identity { name, attributes }
    }

    /// Of whoever has shown a token: its claims `sub` and `iss`, and all as `claim.NAME`.
    pub fn of_token(attributes: Vec<(String, String)>) -> Self {
        let first = |kind: &str| attributes.iter().find(|(found, _)| found == kind);
        let name = match first("sub").or_else(|| first("iss")) {
            Some((kind, name)) if name.len() <= LONGEST_NAME => format!("{kind}:{name}"),
            _ => "a token without sub".to_owned(),
        };
        Identity { name, attributes }
    }

    /// The caller of whom all this is known, and all that is known of `other`.
    #[must_use]
    pub fn and(&self, other: &Identity) -> Self {
        Identity {
            name: self.name.clone(),
            attributes: [&self.attributes[..], &other.attributes].concat(),
        }
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

    /// Bytes of all that is known of it.
    pub fn size(&self) -> usize {
        let attributes = self.attributes.iter();
        self.name.len()
            + attributes
                .map(|(name, value)| name.len() + value.len())
                .sum::<usize>()
    }

    /// All values of an attribute.
    pub fn values<'i>(&'i self, attribute: &'i str) -> impl Iterator<Item = &'i str> {
        self.attributes
            .iter()
            .filter(move |(name, _)| name == attribute)
            .map(|(_, value)| value.as_str())
    }
}
