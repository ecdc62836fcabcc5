//! GetTree.

use std::collections::HashSet;

use bb_remote_execution::proto::reapi::{
    self, Directory, DirectoryNode, FileNode, GetTreeRequest, GetTreeResponse,
};
use prost::Message;
use tonic::{Code, Status};

use super::{
    rule::{Expect, Outcome, Stop, ensure, expect_code, rules, unsupported},
    server::Server,
};

rules! {
    Must, "ContentAddressableStorage.GetTree", "every directory of a tree is returned", whole_tree;
    Must, "ContentAddressableStorage.GetTree", "a root that is missing is NOT_FOUND", missing_root;
    Must, "ContentAddressableStorage.GetTree", "what is missing below the root is left out, and the rest returned", missing_part;
    Must, "GetTreeRequest.page_size", "no response has more directories than the page size that was asked for", page_size;
    Must, "GetTreeRequest.page_token", "a token from a response skips what came before it, and nothing else", page_token;
    Should, "GetTreeRequest.page_token", "a token that the server did not return is INVALID_ARGUMENT", wrong_token;
    Should, "ContentAddressableStorage.GetTree", "the tree of an empty root is one empty directory", empty_root;
}

/// A root with six directories, one of them with a further one.
struct Tree {
    root: reapi::Digest,
    all: Vec<Directory>,
}

fn file(server: &Server) -> FileNode {
    FileNode {
        name: "file".to_owned(),
        digest: Some(server.digest(&server.random(10))),
        ..Default::default()
    }
}

fn child(name: String, digest: reapi::Digest) -> DirectoryNode {
    DirectoryNode {
        name,
        digest: Some(digest),
    }
}

async fn make(server: &Server, left_out: bool) -> Result<Tree, Stop> {
    let leaf = || Directory {
        files: vec![file(server)],
        ..Default::default()
    };
    let mut all = Vec::new();
    let mut children = Vec::new();
    for i in 0..6 {
        let mut directory = leaf();
        if i == 0 {
            let below = leaf();
            directory.directories = vec![child(
                "below".to_owned(),
                server.store_message(&below).await?,
            )];
            all.push(below);
        }
        let digest = match left_out && i == 5 {
            true => server.digest(&directory.encode_to_vec()),
            false => {
                let digest = server.store_message(&directory).await?;
                all.push(directory);
                digest
            }
        };
        children.push(child(format!("d{i}"), digest));
    }
    let root = Directory {
        directories: children,
        ..Default::default()
    };
    let digest = server.store_message(&root).await?;
    all.push(root);
    Ok(Tree { root: digest, all })
}

async fn get(
    server: &Server,
    root: &reapi::Digest,
    page_size: i32,
    page_token: &str,
) -> Result<Vec<GetTreeResponse>, Status> {
    let request = GetTreeRequest {
        instance_name: server.instance.clone(),
        root_digest: Some(root.clone()),
        page_size,
        page_token: page_token.to_owned(),
        digest_function: server.function_value(),
    };
    let mut stream = server.cas().get_tree(request).await?.into_inner();
    let mut pages = Vec::new();
    while let Some(page) = stream.message().await? {
        pages.push(page);
        if pages.len() > 1_000 {
            return Err(Status::data_loss("the stream has no end"));
        }
    }
    Ok(pages)
}

fn set<'a>(directories: impl IntoIterator<Item = &'a Directory>) -> HashSet<Vec<u8>> {
    directories
        .into_iter()
        .map(Message::encode_to_vec)
        .collect()
}

fn directories(pages: &[GetTreeResponse]) -> HashSet<Vec<u8>> {
    set(pages.iter().flat_map(|page| &page.directories))
}

async fn whole_tree(server: &Server) -> Outcome {
    let tree = make(server, false).await?;
    let pages = get(server, &tree.root, 0, "").await.expect_ok("GetTree")?;
    let returned = directories(&pages);
    ensure!(
        returned == set(&tree.all),
        "{} of {} directories are returned",
        returned.len(),
        tree.all.len()
    );
    Ok(())
}

async fn missing_root(server: &Server) -> Outcome {
    let root = server.digest(&server.random(50));
    expect_code(
        get(server, &root, 0, "").await,
        &[Code::NotFound],
        "GetTree",
    )
}

async fn missing_part(server: &Server) -> Outcome {
    let tree = make(server, true).await?;
    let pages = get(server, &tree.root, 0, "").await.expect_ok("GetTree")?;
    let returned = directories(&pages);
    ensure!(
        returned == set(&tree.all),
        "{} of the {} directories that are there are returned",
        returned.len(),
        tree.all.len()
    );
    Ok(())
}

/// Like a client that goes on where a stream ended.
async fn page_size(server: &Server) -> Outcome {
    let tree = make(server, false).await?;
    let mut returned = HashSet::new();
    let mut token = String::new();
    for _ in 0..tree.all.len() {
        let pages = get(server, &tree.root, 2, &token)
            .await
            .expect_ok("GetTree")?;
        for page in &pages {
            let count = page.directories.len();
            ensure!(
                count <= 2,
                "a response has {count} directories, where 2 were asked for"
            );
        }
        returned.extend(directories(&pages));
        token = pages
            .last()
            .map_or(String::new(), |page| page.next_page_token.clone());
        if token.is_empty() {
            break;
        }
    }
    ensure!(
        returned == set(&tree.all),
        "{} of {} directories are returned in all pages",
        returned.len(),
        tree.all.len()
    );
    Ok(())
}

async fn page_token(server: &Server) -> Outcome {
    let tree = make(server, false).await?;
    let first = get(server, &tree.root, 2, "").await.expect_ok("GetTree")?;
    let Some(page) = first.first() else {
        ensure!(false, "GetTree returned no response");
        return Ok(());
    };
    if page.next_page_token.is_empty() {
        return unsupported("all directories came in one response without next_page_token");
    }
    let mut returned = directories(std::slice::from_ref(page));
    let mut token = page.next_page_token.clone();
    while !token.is_empty() && returned.len() <= tree.all.len() {
        let pages = get(server, &tree.root, 0, &token).await;
        let pages = pages.expect_ok("GetTree with a page_token")?;
        let before = returned.len();
        returned.extend(directories(&pages));
        token = pages
            .last()
            .map_or(String::new(), |page| page.next_page_token.clone());
        ensure!(
            token.is_empty() || returned.len() > before,
            "pages have nothing new"
        );
    }
    ensure!(
        returned == set(&tree.all),
        "after the first page, {} of {} directories are known in all",
        returned.len(),
        tree.all.len()
    );
    Ok(())
}

async fn wrong_token(server: &Server) -> Outcome {
    let tree = make(server, false).await?;
    let answer = get(server, &tree.root, 0, "no token of this server's").await;
    expect_code(answer, &[Code::InvalidArgument], "GetTree")
}

async fn empty_root(server: &Server) -> Outcome {
    let pages = get(server, &server.digest(b""), 0, "")
        .await
        .expect_ok("GetTree")?;
    let all: Vec<&Directory> = pages.iter().flat_map(|page| &page.directories).collect();
    ensure!(
        matches!(all.as_slice(), [one] if **one == Directory::default()),
        "{} directories are returned",
        all.len()
    );
    Ok(())
}
