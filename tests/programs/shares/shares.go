// SPDX-License-Identifier: Apache-2.0

// Spends CPU time in named functions, as `profiled shares` does: `shares MILLISECONDS`. It reads a
// byte first, and prints the truth.
package main

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"syscall"
	"unsafe"
)

const clockThreadCPUTimeID = 3

func cpuNs() int64 {
	var now syscall.Timespec
	syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, clockThreadCPUTimeID, uintptr(unsafe.Pointer(&now)), 0)
	return now.Nano()
}

var sink uint64

//go:noinline
func spendMost(ns int64) int64 {
	began := cpuNs()
	for cpuNs() < began+ns {
		for turn, x := 0, uint64(88172645463325252); turn < 60000; turn++ {
			x ^= x << 13
			x ^= x >> 7
			sink += x
		}
	}
	return cpuNs() - began
}

//go:noinline
func spendSome(ns int64) int64 {
	began := cpuNs()
	for cpuNs() < began+ns {
		for turn, x := 0, uint64(88172645463325253); turn < 60000; turn++ {
			x ^= x << 13
			x ^= x >> 7
			sink += x
		}
	}
	return cpuNs() - began
}

//go:noinline
func spendLittle(ns int64) int64 {
	began := cpuNs()
	for cpuNs() < began+ns {
		for turn, x := 0, uint64(88172645463325254); turn < 60000; turn++ {
			x ^= x << 13
			x ^= x >> 7
			sink += x
		}
	}
	return cpuNs() - began
}

var spent [3]int64

//go:noinline
func descend(depth int, leftMs int) int {
	var room [40]byte
	room[depth] = 1
	if depth > 0 {
		return descend(depth-1, leftMs) + int(room[depth])
	}
	for ; leftMs > 0; leftMs -= 10 {
		spent[0] += spendMost(7000000)
		spent[1] += spendSome(2000000)
		spent[2] += spendLittle(1000000)
	}
	return 0
}

func main() {
	runtime.LockOSThread()
	milliseconds, err := strconv.Atoi(os.Args[1])
	if err != nil {
		os.Exit(2)
	}
	if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
		os.Exit(2)
	}
	descend(8, milliseconds)
	fmt.Printf("main.spendMost %d\nmain.spendSome %d\nmain.spendLittle %d\n", spent[0], spent[1], spent[2])
}
