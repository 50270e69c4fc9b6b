// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Opening and closing the dialogs that live in the address, from any page.
import { useNavigate, useSearch } from '@tanstack/react-router';
import { useCallback } from 'react';

import type { PageSearch } from './router';

/** The search parameters of the current page, and a function that changes some of them. */
export function usePageSearch(): [PageSearch, (change: { [key in keyof PageSearch]: PageSearch[key] | undefined }) => void] {
  const search = useSearch({ strict: false }) as PageSearch;
  const navigate = useNavigate();
  const change = useCallback(
    (next: { [key in keyof PageSearch]: PageSearch[key] | undefined }) =>
      void navigate({
        to: '.',
        search: (current: PageSearch) => Object.fromEntries(Object.entries({ ...current, ...next }).filter(([, value]) => value !== undefined)),
      } as never),
    [navigate],
  );
  return [search, change];
}

/** A function that opens a task's log. */
export function useOpenTask(): (upid: string) => void {
  const [, change] = usePageSearch();
  return useCallback((upid: string) => change({ task: upid }), [change]);
}
