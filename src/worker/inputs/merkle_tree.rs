//! Merkle trees of Directories, as nodes that are shared: equal subtrees are the same in memory,
//! however many input roots have them.
//!
//! A `Node` is bounded in its depth, and knows how much is beneath it.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::{
    directory_message::{Directory, MAXIMUM_DEPTH},
    file_cache::FileKey,
};
use crate::{
    digest::{Digest, DigestFunction},
    worker::fault::Fault,
};

/// The tree of a whole input root, or of a directory in one.
pub type Tree = Arc<Node>;

/// A directory of a tree, with all beneath it.
#[derive(Debug)]
pub struct Node {
    pub digest: Digest,
    pub directory: Arc<Directory>,
    /// The node of each of `directory.directories`.
    pub children: Box<[Tree]>,
    /// How many files, directories and symbolic links are beneath it, with repetitions.
    pub entries: u64,
    /// How many directories there are, this one included.
    pub directories: u64,
    /// How many directories are below one another, this one included.
    pub depth: u32,
    /// Whether a client gives modes or times to anything in it.
    pub has_properties: bool,
}

impl Node {
    fn new(digest: Digest, directory: Arc<Directory>, children: Box<[Tree]>) -> Self {
        let mut node = Node {
            digest,
            entries: directory.entries(),
            directories: 1,
            depth: 1,
            has_properties: !directory.properties.is_empty(),
            directory,
            children,
        };
        for child in &node.children {
            node.entries = node.entries.saturating_add(child.entries);
            node.directories = node.directories.saturating_add(child.directories);
            node.depth = node.depth.max(child.depth + 1);
            node.has_properties |= child.has_properties;
        }
        node
    }

    /// The tree of an empty directory.
    pub fn empty() -> Tree {
        let digest = DigestFunction::Sha256.empty();
        Arc::new(Node::new(digest, Arc::default(), Box::default()))
    }

    /// Every distinct node, parents before their children, level by level.
    fn nodes(&self) -> Vec<&Node> {
        let mut seen = HashSet::new();
        let mut nodes = vec![self];
        let mut at = 0;
        while let Some(node) = nodes.get(at).copied() {
            let new = node.children.iter().filter(|node| seen.insert(node.digest));
            nodes.extend(new.map(|node| &**node));
            at += 1;
        }
        nodes
    }

    /// Every file of every distinct directory.
    pub fn files(&self) -> Vec<FileKey> {
        let nodes = self.nodes();
        let files = nodes.iter().flat_map(|node| &node.directory.files);
        files.map(|file| file.key).collect()
    }

    /// The path of a file with this content.
    pub fn path_of(&self, digest: &Digest) -> Option<String> {
        let nodes = self.nodes();
        let mut parents: HashMap<Digest, (&Node, &str)> = HashMap::new();
        for node in &nodes {
            for ((name, child), _) in node.directory.directories.iter().zip(&node.children) {
                parents.entry(*child).or_insert((node, name.as_str()));
            }
        }
        let (mut at, name) = nodes.iter().find_map(|node| {
            let mut files = node.directory.files.iter();
            let file = files.find(|file| file.key.digest == *digest)?;
            Some((*node, file.name.as_str()))
        })?;
        let mut names = vec![name];
        while let Some((parent, name)) = parents.get(&at.digest) {
            names.push(name);
            at = parent;
        }
        names.reverse();
        Some(names.join("/"))
    }
}

/// A directory whose children are being built.
struct OpenNode<'a> {
    digest: Digest,
    directory: &'a Arc<Directory>,
    children: Vec<Tree>,
}

/// Builds the tree of `root`. Every Directory that can be reached from it must be in `found`, or in `known` as a whole
/// tree. Returns all new nodes too. It is not recursive, since a client decides how deep the tree is.
pub fn build(
    root: Digest,
    found: &HashMap<Digest, Arc<Directory>>,
    known: &HashMap<Digest, Tree>,
) -> Result<(Tree, Vec<Tree>), Fault> {
    if let Some(tree) = known.get(&root) {
        return Ok((tree.clone(), Vec::new()));
    }
    let open = |digest: Digest| -> Result<OpenNode<'_>, Fault> {
        let directory = found
            .get(&digest)
            .ok_or_else(|| Fault::Internal(format!("directory {digest} was not fetched")))?;
        Ok(OpenNode {
            digest,
            directory,
            children: Vec::with_capacity(directory.directories.len()),
        })
    };
    let mut finished: HashMap<Digest, Tree> = HashMap::new();
    let mut above: HashSet<Digest> = HashSet::from([root]);
    let mut stack = vec![open(root)?];
    let mut new = Vec::new();
    while let Some(top) = stack.last_mut() {
        match top.directory.directories.get(top.children.len()) {
            Some((_, child)) => {
                if let Some(tree) = known.get(child).or_else(|| finished.get(child)) {
                    top.children.push(tree.clone());
                } else if above.insert(*child) {
                    stack.push(open(*child)?);
                } else {
                    return Err(Fault::Invalid(format!(
                        "directory {child} of the input root contains itself"
                    )));
                }
            }
            None => {
                let Some(OpenNode {
                    digest,
                    directory,
                    children,
                }) = stack.pop()
                else {
                    break;
                };
                above.remove(&digest);
                let node = Node::new(digest, directory.clone(), children.into());
                if node.depth > MAXIMUM_DEPTH + 1 {
                    return Err(Fault::Invalid(format!(
                        "the input root has more than {MAXIMUM_DEPTH} directories below one another"
                    )));
                }
                let tree = Arc::new(node);
                finished.insert(digest, tree.clone());
                new.push(tree);
            }
        }
        if stack.len() > MAXIMUM_DEPTH as usize + 1 {
            return Err(Fault::Invalid(format!(
                "the input root has more than {MAXIMUM_DEPTH} directories below one another"
            )));
        }
    }
    match new.last() {
        Some(tree) => Ok((tree.clone(), new)),
        None => Err(Fault::Internal(format!("directory {root} was not built"))),
    }
}
