"Numbers for samples, scores and reconstructions."
