"""An HTTP server with OpenAI's API over one model (extra `server`): what comes in is bounded, what leaves is
cancelled."""
