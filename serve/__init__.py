"""The HTTP service: a base model and its plug-in models behind OpenAI's wire format.

Ray and FastAPI are thin skins here; what they call are plain classes that run without them."""
