// As app.py, for Go's own server. Writes a line for each answer, method, path and status.
package main

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strconv"
)

func answer(w http.ResponseWriter, request *http.Request) {
	status, text := http.StatusOK, []byte{}
	file, err := os.ReadFile(os.Getenv("SITE") + request.URL.Path)
	switch {
	case request.Method == http.MethodPost:
		text, _ = io.ReadAll(request.Body)
	case request.Header.Get("If-Modified-Since") != "":
		status = http.StatusNotModified
	case err != nil:
		status = http.StatusNotFound
	default:
		text = file
	}
	if status != http.StatusNotModified {
		w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	}
	w.WriteHeader(status)
	if request.Method != http.MethodHead {
		w.Write(text)
	}
	fmt.Println(request.Method, request.URL.Path, status)
}

func main() {
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Args[1], http.HandlerFunc(answer)))
}
