"""Sources of texts: files to paragraphs, paragraphs to ids, ids to sequences."""
