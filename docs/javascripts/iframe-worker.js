// A browser starts no worker for a page that comes from a folder. There the site's search runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    #frame = document.createElement("iframe")
    #started

    constructor(url) {
      super()
      this.#frame.hidden = true
      this.#frame.title = "search"
      // the page's head runs this before there is a body
      this.#started = new Promise((resolve, reject) => {
        const start = () => {
          document.body.append(this.#frame)
          // in a worker, postMessage speaks to the page
          this.#frame.contentWindow.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
          const script = this.#frame.contentDocument.createElement("script")
          script.onload = resolve
          script.onerror = () => reject(new Error(`${url} was not loaded`))
          script.src = url
          this.#frame.contentDocument.head.append(script)
        }
        if (document.body) start()
        else addEventListener("DOMContentLoaded", start)
      })
      this.#started.catch(error => this.dispatchEvent(new ErrorEvent("error", { message: error.message, error })))
    }

    postMessage(data) {
      this.#started.then(() => this.#frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })), () => {})
    }

    terminate() {
      this.#frame.remove()
    }
  }
}
