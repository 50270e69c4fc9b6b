// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Renders a component as the page does, at an address, against answers given by path.
import { MantineProvider } from '@mantine/core';
import { QueryClientProvider } from '@tanstack/react-query';
import { createMemoryHistory, createRootRoute, createRoute, createRouter, RouterProvider } from '@tanstack/react-router';
import { render } from '@testing-library/react';
import type { ReactNode } from 'react';
import { vi } from 'vitest';

import { queryClient } from '../api/queries';
import { theme } from '../app/theme';

export interface Call {
  method: string;
  path: string;
  parameters: Record<string, string>;
}

type Answers = Record<string, (call: Call) => { status?: number; body: unknown }>;

/** Answers calls by "METHOD /path"; returns the calls that changed something. */
export function serve(answers: Answers): Call[] {
  const changes: Call[] = [];
  vi.stubGlobal('fetch', async (target: string, init: RequestInit) => {
    const url = new URL(target, 'http://node');
    const call = {
      method: init.method ?? 'GET',
      path: url.pathname.replace('/api2/json', ''),
      parameters: Object.fromEntries(init.body ? new URLSearchParams(String(init.body)) : url.searchParams),
    };
    if (call.method !== 'GET') changes.push(call);
    const { status = 200, body } = answers[`${call.method} ${call.path}`]?.(call) ?? { body: { data: [] } };
    return new Response(JSON.stringify(body), { status });
  });
  return changes;
}

export function renderPage(page: ReactNode): void {
  queryClient.clear();
  const root = createRootRoute();
  const routes = ['/', '/guests/$vmid', '/nodes/$node'].map((path) => createRoute({ getParentRoute: () => root, path, component: () => page }));
  const router = createRouter({ routeTree: root.addChildren(routes), history: createMemoryHistory() });
  render(
    <MantineProvider theme={theme} env="test">
      <QueryClientProvider client={queryClient}>
        <RouterProvider router={router as never} />
      </QueryClientProvider>
    </MantineProvider>,
  );
}
