//! Language models, whole VLMs and adapters of others, in every spelling that changes numbers.
