//! Tokenizers and chat templates as transformers has them.
