//! Storage: the Content Addressable Storage and the Action Cache, embedded or elsewhere.
