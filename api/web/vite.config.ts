// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Build of the web page. `ATOLL_URL` names the node that the development server forwards API calls to.
import react from '@vitejs/plugin-react';
import { defineConfig } from 'vitest/config';

const node = process.env.ATOLL_URL ?? 'https://127.0.0.1:8006';

export default defineConfig({
  plugins: [react()],
  base: '/',
  // light-dark() must reach the browser: the scheme is chosen at run time, which a lowered form cannot see.
  build: { target: 'es2022', cssTarget: ['chrome123', 'firefox121', 'safari17.5'], chunkSizeWarningLimit: 900 },
  server: { proxy: { '/api2': { target: node, secure: false, ws: true, changeOrigin: false } } },
  test: { environment: 'happy-dom', setupFiles: ['src/test/setup.ts'], restoreMocks: true },
});
